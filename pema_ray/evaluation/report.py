"""The report: one self-contained HTML file that shows an `Evaluation`.

Knows the evaluation's figures, the plots and a template; no model, no Ray. The file makes no request
(its own content policy forbids them), and all text in it is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pema_ray.evaluation import plots
from pema_ray.evaluation.results import Evaluation, Example, SystemScore, TokenShare
from pema_ray.runtime.files import atomic_file

_OPEN_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the headline row: its label, the owner that sets its colour, and whether it is the best."""

    label: str
    value: str
    owner: str = "none"
    best: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """A group of figures, and a note that explains them."""

    title: str
    figures: tuple[Figure, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    svg: Markup
    note: str


def write_report(evaluation: Evaluation, path: Path) -> Path:
    """Write the report to `path` (parent folders are made), atomically; returns `path`."""
    page = render_report(evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render_report(evaluation: Evaluation) -> str:
    """The report's HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "seconds": seconds, "visible": visible, "mean_share": mean_share}
    environment.tests["rewritten"] = was_postprocessed
    template = files("pema_ray.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    systems = evaluation.systems
    return environment.from_string(template).render(
        evaluation=evaluation,
        cards=headline(evaluation),
        verdict=verdict(systems),
        best=best_values(systems),
        has_archaic=any(system.archaic_share is not None for system in systems),
        most_bleu=max((system.bleu for system in systems), default=0) or 1,
        owners={"plm": "plm", "few_shot": "plm", "pema": "pema", "copy": "none"},
        plots=draw_plots(evaluation),
        open_examples=_OPEN_EXAMPLES,
    )


def chosen_system(systems: Sequence[SystemScore], kind: str) -> SystemScore | None:
    """The configured system of a kind, else the one with the highest sBLEU; None if the kind was not scored."""
    systems_of_kind = (system for system in systems if system.kind == kind)
    return max(systems_of_kind, key=lambda system: (system.configured, system.bleu), default=None)


def best_values(systems: Sequence[SystemScore]) -> dict[str, float | None]:
    """The best value of each scored column: highest sBLEU and chrF, lowest archaic share."""
    return {
        "bleu": max((system.bleu for system in systems), default=None),
        "chrf": max((system.chrf for system in systems), default=None),
        "archaic": min((system.archaic_share for system in systems if system.archaic_share is not None), default=None),
    }


def verdict(systems: Sequence[SystemScore]) -> str:
    """The sBLEU figures in a sentence."""
    pema = chosen_system(systems, "pema")
    if pema is None:
        return "No system with PEMA was scored."
    rivals = [rival for kind in ("plm", "few_shot", "copy") if (rival := chosen_system(systems, kind)) is not None]
    compared = [f"{_against(pema.bleu, rival.bleu)} {_in_a_sentence(rival)}" for rival in rivals]
    sentence = f"{pema.name} scores {pema.bleu:.1f} sBLEU"
    sentence += f": {_enumerate(compared)}." if compared else "."
    best = max((system for system in systems if system.kind == "pema"), key=lambda system: system.bleu)
    if best.bleu > pema.bleu:
        sentence += f" {best.name} scores {best.bleu:.1f}, chosen on the same {best.examples:,} examples."
    return sentence


def headline(evaluation: Evaluation) -> list[Card]:
    """NLL, sBLEU and archaic share, as far as they were measured."""
    systems, sweep = evaluation.systems, evaluation.sweep
    note = f"Nats per target token over {sweep.rows:,} rows, PEMA at λ = 1. Lower is better."
    measured_nll = zip(sweep.nll, sweep.lambdas, strict=True)
    lowest = min((pair for pair in measured_nll if math.isfinite(pair[0])), default=None)
    if lowest:
        note += f" Best mixture {lowest[0]:.3f} at λ = {lowest[1]:g}."
    likelihood = (
        Figure("PLM", f"{sweep.plm:.3f}", "plm", sweep.plm < sweep.pema),
        Figure("PEMA", f"{sweep.pema:.3f}", "pema", sweep.pema < sweep.plm),
    )
    cards = [Card("Negative log-likelihood", likelihood, note)]

    plm, pema, copy = (chosen_system(systems, kind) for kind in ("plm", "pema", "copy"))
    alone = plm.name if plm else "PLM alone"
    scored = ((alone, "plm", plm), ("PEMA", "pema", pema), ("copy of source", "none", copy))
    present = [(label, owner, score) for label, owner, score in scored if score is not None]
    if present:
        top = max(score.bleu for _, _, score in present)
        figures = tuple(Figure(label, f"{score.bleu:.1f}", owner, score.bleu == top) for label, owner, score in present)
        cards.append(Card("sBLEU", figures, f"On {present[0][2].examples:,} test examples. Higher is better."))

    shares = (
        ("source", "none", evaluation.source_archaic_share),
        (alone, "plm", plm.archaic_share if plm else None),
        ("PEMA", "pema", pema.archaic_share if pema else None),
    )
    measured = [(label, owner, share) for label, owner, share in shares if share is not None]
    if measured:
        low = min(share for label, _, share in measured)
        figures = tuple(Figure(label, percent(share), owner, share == low) for label, owner, share in measured)
        note = "Texts that match the task’s archaic pattern."
        if evaluation.reference_archaic_share is not None:
            note += f" The references: {percent(evaluation.reference_archaic_share)}."
        cards.append(Card("Archaic share", figures, note))
    return cards


def draw_plots(evaluation: Evaluation) -> list[Plot]:
    """The plots that have figures."""
    training, sweep = evaluation.training, evaluation.sweep
    trained = f"Rank {training.rank}, {training.space.replace('_', '-')} space, κ = {training.kappa:g}, "
    trained += f"{seconds(training.seconds)}."
    if training.reconstruction_error is not None:
        trained += f" Reconstruction error after stage 1: {training.reconstruction_error:.4f}."
    ends = f"End-of-sequence tokens, counted apart: PLM {sweep.eos_plm:.3f}, PEMA {sweep.eos_pema:.3f} nats."
    drawn = [
        ("Loss over training", plots.training_plot(training), trained),
        ("NLL against λ", plots.sweep_plot(sweep), ends),
        ("sBLEU against λ_max", plots.bleu_plot(evaluation.systems), "Dots are measured; lines only join them."),
    ]
    if any(system.archaic_share is not None for system in evaluation.systems):
        note = "The share of outputs that still match the archaic pattern; the references are the aim."
        drawn.append(("Archaic share against λ_max", plots.archaic_plot(evaluation), note))
    if evaluation.lambda_curves:
        note = "λ = 1 lets PEMA alone decide, λ = 0 the PLM alone."
        drawn.append(("λ over positions", plots.schedule_plot(evaluation.lambda_curves), note))
    return [Plot(title, Markup(svg), note) for title, svg, note in drawn]  # `plots` escapes its text


def percent(share: float) -> str:
    """0.1234 as `12.3 %`."""
    return f"{share:.1%}".replace("%", "\N{NARROW NO-BREAK SPACE}%")


def seconds(duration: float) -> str:
    """A readable duration: `4.2 s`, `2 min 35 s`, `1 h 04 min`."""
    if duration < 59.95:
        return f"{duration:.1f} s"
    minutes, remainder = divmod(round(duration), 60)
    return f"{minutes} min {remainder:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def visible(text: str) -> str:
    """A token's text with its line breaks and tabs made visible."""
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


def mean_share(tokens: Sequence[TokenShare]) -> str:
    """PEMA's mean share over an answer."""
    return percent(sum(token.share for token in tokens) / len(tokens)) if tokens else "–"


def was_postprocessed(example: Example) -> bool:
    """Whether the scored answer differs from the text of the decoded tokens."""
    return example.pema.strip() not in "".join(token.text for token in example.tokens)


def _in_a_sentence(system: SystemScore) -> str:
    if system.kind == "copy":
        return "copying the source"
    name, _, detail = system.name.partition(", ")
    return f"the {name} with {detail}" if detail else f"the {name}"


def _against(score: float, rival: float) -> str:
    difference = round(score, 1) - round(rival, 1)
    if abs(difference) < 0.05:
        return "level with"
    return f"{abs(difference):.1f} {'above' if difference > 0 else 'below'}"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
