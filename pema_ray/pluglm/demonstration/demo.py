"""`pema-ray pluglm demo`: train two small models to look facts up, edit the memory of each, and report the answers.

The facts are synthetic: this shows the mechanism; the published gain on natural text is not claimed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from pema_ray.evaluation.plots import Level, Series, line_plot
from pema_ray.pluglm.demonstration.learning import FactsSettings, Point, learn
from pema_ray.pluglm.demonstration.measures import FactsFigures, measure
from pema_ray.pluglm.retrieval import render_template
from pema_ray.pluglm.stages.pretrain import save_model
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section

OURS, FAITHFUL = "contrastive warm-up, value pooler, cosine", "as published"


class Mode(Section):
    """One model of the demonstration."""

    name: str
    settings: FactsSettings
    figures: FactsFigures
    history: tuple[dict[str, float], ...]
    """Measurements over training (`learning.learn`)."""
    seconds: float


class Demo(Section):
    """Both models of one seed."""

    seed: int
    modes: tuple[Mode, ...]

    def write(self, folder: Path) -> Path:
        """Write `demo.json`, `demo.svg` and `demo.html`; returns the page's path."""
        plot = accuracy_plot(self.modes)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("demo.json", self.model_dump_json(indent=1) + "\n"),
            ("demo.svg", standalone(plot)),
            ("demo.html", render(self, plot)),
        ):
            with atomic_file(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return folder / "demo.html"


def run_demo(
    folder: Path,
    seed: int = 0,
    settings: FactsSettings | None = None,
    faithful: bool = True,
    on_point: Callable[[str, Point], None] = lambda mode, point: None,
) -> Demo:
    """Train and measure; writes models, memories and the page to `folder`.

    Args:
        faithful: train the published objective too.
        on_point: receives the measurements during training.
    """
    ours = settings or FactsSettings()
    modes = []
    for name, settings in ((OURS, ours), (FAITHFUL, ours.faithful))[: 1 + faithful]:
        began = time.perf_counter()
        model, unseen_F, history = learn(settings, seed, lambda point, name=name: on_point(name, point))
        mode_folder = folder / ("faithful" if name == FAITHFUL else "ours")
        shutil.rmtree(mode_folder, ignore_errors=True)
        mode_folder.mkdir(parents=True)
        figures = measure(model, settings.world, unseen_F, mode_folder, seed)
        save_model(model, settings.world.tokenizer(), mode_folder / "model")
        seconds = round(time.perf_counter() - began, 1)
        modes.append(Mode(name=name, settings=settings, figures=figures, history=tuple(history), seconds=seconds))
    demo = Demo(seed=seed, modes=tuple(modes))
    demo.write(folder)
    return demo


def accuracy_plot(modes: Sequence[Mode]) -> str:
    """Plot of the accuracy on facts with new values, over training."""
    series = []
    for mode, colour in zip(modes, ("var(--pema)", "var(--plm)")):
        for key, label, dash in (("asked", "asked in training", ""), ("held_out", "never asked", "7 4")):
            points = [(point["step"], point[key]) for point in mode.history]
            series.append(Series(f"{mode.name}: {label}", points, colour, dash))
    chance = 1 / modes[0].settings.values
    return line_plot(
        "Accuracy after all values were changed in the memory", "training step", "accuracy", series,
        levels=[Level(f"chance {chance:.0%}", chance)], y_range=(0.0, 1.04), percent=True,
    )  # fmt: skip


def standalone(plot: str) -> str:
    """A plot of `line_plot` as a separate file, with a page's colours."""
    style = (
        "<style>svg{--ink:#1d2430;--muted:#6b7482;--line:#d9dee6;--card:#fff;--plm:#2f6fdf;--pema:#d1495b;"
        "font:12px system-ui,sans-serif;background:#fff;overflow:visible}text{fill:var(--muted)}.key{fill:var(--ink)}"
        ".grid{stroke:var(--line)}.axis{stroke:var(--muted)}.quiet{opacity:0}</style>"
    )
    head, rest = plot.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def render(demo: Demo, plot: str) -> str:
    """The page; it makes no request."""
    package = "pema_ray.pluglm.demonstration"
    return render_template(package, "demo.html.j2", demo=demo, plot=Markup(plot), rows=ROWS)


ROWS: tuple[tuple[str, str, str], ...] = (
    ("edited", "all values edited in the memory, weights untouched", "≥ .98"),
    ("edited_held_out", "the same, facts that training never asked about", "≥ .90"),
    ("added", "facts never asked about, deleted and added again", "≥ .90"),
    ("before_adding", "the same facts while they are deleted", ""),
    ("built", "with the memory as it was built", ""),
    ("other_domain", "a second domain's memory swapped in, its own facts", ""),
    ("old_memory", "the old memory, asked about the new truth", "≤ .10"),
    ("shuffled", "values shuffled among the keys", ""),
    ("none", "no memory", ""),
    ("flipped", "edits of one entry that change the answer to its fact", "1"),
    ("others_changed", "answers to other facts that these edits change", "0"),
    ("restored", "logits are bit for bit the same when edits and swaps are undone", "yes"),
)
"""(figure, meaning, aim)"""
