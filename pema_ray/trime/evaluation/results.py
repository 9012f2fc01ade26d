"""The results of an evaluation, typed: JSON on disk, Markdown for a reader. Knows no model."""

from __future__ import annotations

import math
from pathlib import Path

from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section


class Chosen(Section):
    """What was chosen on the dev split; None where the system does not use it."""

    tau: float | None = None
    weight: float | None = None
    """λ of `li`."""
    interp_temp: float | None = None
    second_weight: float | None = None
    """lmbda."""

    def __str__(self) -> str:
        values = {"τ": self.tau, "λ": self.weight, "T": self.interp_temp, "lmbda": self.second_weight}
        return ", ".join(f"{name} {value:.3g}" for name, value in values.items() if value is not None) or "–"


class SystemScores(Section):
    """One system on both splits."""

    system: str
    label: str
    datastore: str | None = None
    """Its name; None: the system searches none."""
    chosen: Chosen
    dev_nll: float
    """Nats per token."""
    test_nll: float

    @property
    def dev_perplexity(self) -> float:
        return math.exp(self.dev_nll)

    @property
    def test_perplexity(self) -> float:
        return math.exp(self.test_nll)


class Curve(Section):
    """Dev perplexity against one varied setting; the others are calibrated anew (or, for λ, kept)."""

    title: str
    x_label: str
    name: str
    points: tuple[tuple[float, float], ...]


class Pass(Section):
    """How fast one pass over a text was."""

    name: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, self.seconds)


class TrimeEvaluation(Section):
    """`evaluation.json`."""

    model: str
    fingerprint: str
    memory: str
    """What it was trained with."""
    updates: int | None
    tokens: dict[str, int]
    """Scored, by split."""
    per_character: bool
    """Tokens are characters or bytes: bits are bits per character."""
    scores: tuple[SystemScores, ...]
    curves: tuple[Curve, ...] = ()
    passes: tuple[Pass, ...] = ()

    def save(self, folder: Path) -> None:
        with atomic_file(folder / "evaluation.json") as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")
        with atomic_file(folder / "table.md") as temporary:
            temporary.write_text(markdown(self), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrimeEvaluation:
        return cls.model_validate_json((folder / "evaluation.json").read_text())


def markdown(evaluation: TrimeEvaluation) -> str:
    """The table of one model."""
    unit = "bits per character" if evaluation.per_character else "perplexity"
    lines = [
        f"{evaluation.model} ({evaluation.fingerprint}), trained with memory `{evaluation.memory}`; "
        f"{evaluation.tokens['dev']:,} dev and {evaluation.tokens['test']:,} test tokens; τ, λ, T chosen on dev.",
        "",
        f"| system | datastore | chosen | dev {unit} | test {unit} |",
        "|---|---|---|---|---|",
    ]
    for row in evaluation.scores:
        dev, test = (shown(value, evaluation.per_character) for value in (row.dev_nll, row.test_nll))
        lines.append(f"| {row.label} | {row.datastore or '–'} | {row.chosen} | {dev} | {test} |")
    speeds = ", ".join(f"{row.name} {row.tokens_per_second:,.0f}" for row in evaluation.passes)
    return "\n".join(lines) + (f"\n\nTokens a second: {speeds}.\n" if speeds else "\n")


def shown(nll: float, per_character: bool) -> str:
    return f"{nll / math.log(2):.3f}" if per_character else f"{math.exp(nll):.2f}"
