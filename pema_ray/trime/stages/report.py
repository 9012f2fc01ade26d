"""`pema-ray trime report`: one HTML file of tables and plots, and which entries raised the probability of each token.

The plots are `pema_ray.evaluation.plots`'; the page makes no request, and all text in it is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pema_ray.evaluation.plots import Level, Series, line_plot
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.evaluation.explain import Explained, explain_test
from pema_ray.trime.evaluation.results import Curve, TrimeEvaluation, shown
from pema_ray.trime.run import TrimeRun

_COLOURS = ("var(--pema)", "var(--plm)", "var(--ink)", "var(--muted)")
_DASHES = ("", "7 4", "2 4")


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `report/report.html`."""
    run = TrimeRun(config)

    def work() -> dict[str, Any]:
        evaluation = TrimeEvaluation.load(run.path("evaluate"))
        page = render(evaluation, history_of(run), explain_test(run, evaluation))
        with atomic_file(run.path("report", "report.html")) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return {"summary": str(run.path("report", "report.html"))}

    return run.perform("report", work)


def history_of(run: TrimeRun) -> dict[str, Any] | None:
    """The losses of training; None if they are not beside the model."""
    path = run.model_folder.parent / "history.json"
    return json.loads(path.read_text()) if path.exists() else None


def render(evaluation: TrimeEvaluation, history: dict[str, Any] | None, explained: Explained | None) -> str:
    """The report's HTML."""
    plots = [] if history is None else [loss_plot(history)]
    plots += [curve_plot(title, curves) for title, curves in _by_title(evaluation.curves).items()]
    return _page(evaluation, plots, explained)


def write_page(explained: Explained, path: Path) -> None:
    """The page of one text alone."""
    with atomic_file(path) as temporary:
        temporary.write_text(_page(None, [], explained), encoding="utf-8")


def _page(evaluation: TrimeEvaluation | None, plots: Sequence[str], explained: Explained | None) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unit"] = lambda nll: shown(nll, evaluation is not None and evaluation.per_character)
    template = environment.from_string(files("pema_ray.trime").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(evaluation=evaluation, plots=[Markup(plot) for plot in plots], explained=explained)


def loss_plot(history: dict[str, Any]) -> str:
    """Training and validation loss over updates."""
    losses, vocabulary_losses = (
        [(point["step"], point[name]) for point in history["validation"]] for name in ("loss", "vocabulary_loss")
    )
    series = [
        Series("training", _means_between(history), colour="var(--muted)", width=1.2),
        Series("validation", losses),
        Series("validation, vocabulary alone", vocabulary_losses, "var(--plm)", "7 4"),
    ]
    best = Level(f"best, update {history['best_step']:,}", float(history["best_step"]), "x", "var(--pema)")
    return line_plot("Loss over updates", "update", "nats per token", series, levels=[best])


def _means_between(history: Mapping[str, Any]) -> list[tuple[float, float]]:
    """At each validation, the mean training loss since the one before."""
    step_S, loss_S = (np.array([point[name] for point in history["train"]]) for name in ("step", "loss"))
    ends = pairwise(point["step"] for point in history["validation"])
    between = [(end, loss_S[(step_S > begin) & (step_S <= end)]) for begin, end in ends]
    return [(end, float(losses.mean())) for end, losses in between if len(losses)]


def curve_plot(title: str, curves: Sequence[Curve]) -> str:
    """Curves of several systems in one plot."""
    series = [
        Series(curve.name, curve.points, _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
        for i, curve in enumerate(curves)
    ]
    return line_plot(title, curves[0].x_label, f"{title.split()[0].lower()} on dev", series)


def _by_title(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    titled: dict[str, list[Curve]] = {}
    for curve in curves:
        titled.setdefault(curve.title, []).append(curve)
    return titled
