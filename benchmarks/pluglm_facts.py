"""PlugLM: the demonstration of edited facts over several seeds, beside the published objective; a plot.

Not a measurement of speed: figures are accuracies (`pema_ray.pluglm.demonstration`). Results in `--out` with the same
settings are reused, so that a stopped run continues. Ratios: the worst over seeds of each figure that has an aim.
The plot beside the JSON shows the accuracy over training of the first seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from _harness import Aim, console, device_of, options, show, write_results

from pema_ray.pluglm.demonstration.demo import FAITHFUL, OURS, Demo, Mode, accuracy_plot, run_demo, standalone
from pema_ray.pluglm.demonstration.learning import FactsSettings

NAME = "pluglm_facts"
AIMS = {
    "edited": Aim(0.98), "edited_held_out": Aim(0.90), "added": Aim(0.90), "old_memory": Aim(0.10, at_most=True),
    "flipped": Aim(1.0), "others_changed": Aim(0, at_most=True), "restored": Aim(1.0), "weights_unchanged": Aim(1.0),
    "minutes": Aim(10, at_most=True),
}  # fmt: skip
FIGURES = (
    "edited", "edited_held_out", "added", "before_adding", "built", "other_domain", "old_memory", "shuffled", "none",
    "flipped", "others_changed",
)  # fmt: skip


def main() -> None:
    o = _options()
    device_of(o)
    settings = FactsSettings()
    if o.smoke:
        settings = FactsSettings(entities=4, relations=2, values=3, steps=4, batch_size=4, contrastive_steps=2)
    demos = [_demo(o.out / str(seed), seed, settings) for seed in o.seeds]
    worst = {name: (max if aim.at_most else min)(_aimed(demo, name) for demo in demos) for name, aim in AIMS.items()}
    notes = []
    figures: dict[str, object] = {"seeds": list(o.seeds), "settings": settings.model_dump(), "smoke": o.smoke}
    for number, mode in enumerate(demos[0].modes):
        modes = [demo.modes[number] for demo in demos]
        by_figure = {name: [float(getattr(mode.figures, name)) for mode in modes] for name in FIGURES}
        by_figure["found"] = [mode.history[-1]["found"] for mode in modes]
        by_figure["seconds"] = [mode.seconds for mode in modes]
        figures[mode.name] = by_figure
        notes += [f"{mode.name}: {name} {mean(values):.3f} {values}" for name, values in by_figure.items()]
    show(f"PlugLM: edited facts, the worst of {len(demos)} seeds", worst, AIMS, notes)
    written = write_results(NAME, worst, AIMS, figures, o.results_dir)
    written.with_suffix(".svg").write_text(standalone(accuracy_plot(demos[0].modes)))
    console.print(f"written: {written}, {written.with_suffix('.svg')}")


def _options() -> argparse.Namespace:
    parser = options("Facts edited in PlugLM's memory, over seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/pluglm_facts"), help="models, memories and pages")
    parser.set_defaults(threads=1)  # the matrices are too small for more
    return parser.parse_args()


def _demo(folder: Path, seed: int, settings: FactsSettings) -> Demo:
    modes = [
        _mode(folder / "ours", seed, OURS, settings),
        _mode(folder / "faithful", seed, FAITHFUL, settings.faithful),
    ]
    demo = Demo(seed=seed, modes=tuple(modes))
    demo.write(folder)
    return demo


def _mode(folder: Path, seed: int, name: str, settings: FactsSettings) -> Mode:
    path = folder / "demo.json"
    if path.exists():
        stored = Demo.model_validate(json.loads(path.read_text()))
        if stored.seed == seed and stored.modes[0].settings == settings:
            return stored.modes[0].model_copy(update={"name": name})
    console.print(f"seed {seed}, {name}")
    demo = run_demo(folder, seed, settings, faithful=False, on_point=_tell)
    return demo.modes[0].model_copy(update={"name": name})


def _tell(mode: str, point: dict[str, float]) -> None:
    if point["step"] % 500 == 0:
        console.print(f"{mode}, step {point['step']:.0f}: {point}")


def _aimed(demo: Demo, name: str) -> float:
    figures = demo.modes[0].figures
    if name == "minutes":
        return sum(mode.seconds for mode in demo.modes) / 60
    if name == "weights_unchanged":
        return float(figures.weights_before == figures.weights_after)
    return float(getattr(figures, name))


if __name__ == "__main__":
    main()
