"""The comparison of PEMA with its peers: figures, significance, and a Markdown table. Knows no model and no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from pydantic import Field

from pema_ray.evaluation.results import Result
from pema_ray.evaluation.scores import Scorer


class Measurement(Result):
    """One system on the test pairs, trained with one seed."""

    seed: int
    nll: float | None = None
    """Nats per target token, without EOS; None for a system without a likelihood."""
    bleu: float
    chrf: float
    archaic_share: float | None = None
    train_seconds: float | None = None
    peak_bytes: int | None = None
    """Most memory held by the process that trained."""
    seconds_per_token: float | None = None
    """Of answers, in batches of `generate.batch_size`."""
    line_bytes: int | None = None
    """Representations that the PLM owner sends, for training, tuning and answers."""
    note: str = ""
    """The settings chosen on the dev pairs."""


class Significance(Result):
    """A system's sBLEU against the reference system's, by paired bootstrap over the test pairs (Koehn, 2004)."""

    bleu_low: float
    bleu_high: float
    """95 % interval of the system's own sBLEU."""
    bleu_p: float | None = None
    """Of no difference from the reference system; None for that system itself."""
    chrf_p: float | None = None


class Peer(Result):
    """One system: a measurement for every seed."""

    name: str
    given: str
    """What it needs beside prompts."""
    measurements: tuple[Measurement, ...] = Field(min_length=1)
    significance: Significance | None = None
    """Of the first seed's answers."""

    def mean(self, figure: str) -> float | None:
        """Mean of a figure over the seeds; None if it was never measured."""
        values = self._values(figure)
        return mean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Standard deviation of a figure over the seeds; None for a single one."""
        values = self._values(figure)
        return stdev(values) if len(values) > 1 else None

    def _values(self, figure: str) -> list[float]:
        return [value for m in self.measurements if (value := getattr(m, figure)) is not None]

    @property
    def bleu(self) -> float:
        """The mean over the seeds."""
        return mean(m.bleu for m in self.measurements)


class Comparison(Result):
    """Several systems on one task, with one PLM and the same pairs."""

    task: str
    plm_name: str
    train_pairs: int
    test_pairs: int
    decoding: str
    bleu_signature: str
    reference: str | None = None
    """The system that the others are tested against."""
    bootstrap_samples: int = 0
    peers: tuple[Peer, ...] = Field(min_length=1)


def significance(
    scorer: Scorer, answers: Mapping[str, Sequence[str]], reference: str, samples: int
) -> dict[str, Significance]:
    """sacreBLEU's paired bootstrap of every system against one of them.

    Args:
        answers: one for each of the scorer's references, by system.
        samples: draws of as many pairs as there are.
    """
    from sacrebleu.significance import PairedTest

    systems: Any = [
        (reference, list(answers[reference])),
        *((n, list(a)) for n, a in answers.items() if n != reference),
    ]
    metrics = {"BLEU": scorer.bleu, "chrF": scorer.chrf}
    test = PairedTest(systems, metrics, [scorer.references], test_type="bs", n_samples=samples)
    _, columns = test()  # in the order of the metrics; sacreBLEU chooses their names
    values: Any = columns.values()
    _, bleu_scores, chrf_scores = values
    figures: Any = zip((name for name, _ in systems), bleu_scores, chrf_scores, strict=True)
    by_system: dict[str, Significance] = {}
    baseline = bleu_scores[0], chrf_scores[0]
    for name, *scores in figures:
        # Where no draw differs, sacreBLEU gives its smallest p: no difference exceeds none.
        pairs = zip(scores, baseline, strict=True)
        p = [1.0 if score.score == other.score and score.p_value else score.p_value for score, other in pairs]
        bleu, half = scores[0], scores[0].ci or 0.0
        by_system[name] = Significance(bleu_low=bleu.mean - half, bleu_high=bleu.mean + half, bleu_p=p[0], chrf_p=p[1])
    return by_system


_HEADER = (
    "system", "must be given", "seeds", "NLL", "sBLEU", "95 %", "p", "chrF", "old style", "training", "peak memory",
    "a token", "over the line",
)  # fmt: skip


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, in the order of its systems."""
    c = comparison
    lines = [
        f"{c.task}: {c.train_pairs:,} training pairs, {c.test_pairs:,} test pairs, {c.plm_name}, {c.decoding}.",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|" + "---|" * len(_HEADER),
        *("| " + " | ".join(_cells(peer)) + " |" for peer in c.peers),
        "",
        f"NLL in nats per target token. Means over the seeds ± standard deviation. {c.bleu_signature}",
    ]
    if c.reference:
        lines.append(
            f"95 % and p: paired bootstrap of the first seed's answers, {c.bootstrap_samples:,} samples; p of no "
            f"difference in sBLEU from {c.reference}."
        )
    notes = [
        f"- {peer.name}{f', seed {m.seed}' if len(peer.measurements) > 1 else ''}: {m.note}"
        for peer in c.peers
        for m in peer.measurements
        if m.note
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _cells(peer: Peer) -> Sequence[str]:
    tested = peer.significance
    return (
        peer.name,
        peer.given,
        str(len(peer.measurements)),
        _figure(peer, "nll", "{:.3f}"),
        _figure(peer, "bleu", "{:.1f}"),
        "" if tested is None else f"{tested.bleu_low:.1f} to {tested.bleu_high:.1f}",
        "" if tested is None or tested.bleu_p is None else f"{tested.bleu_p:.3f}",
        _figure(peer, "chrf", "{:.1f}"),
        _figure(peer, "archaic_share", "{:.1f} %", 100),
        _figure(peer, "train_seconds", "{:,.0f} s"),
        _figure(peer, "peak_bytes", "{:,.0f} MiB", 2**-20),
        _figure(peer, "seconds_per_token", "{:.1f} ms", 1000),
        _figure(peer, "line_bytes", "{:,.1f} MiB", 2**-20),
    )


_SPREAD = ("nll", "bleu", "chrf", "archaic_share")


def _figure(peer: Peer, figure: str, form: str, factor: float = 1) -> str:
    value, deviation = peer.mean(figure), peer.deviation(figure)
    if value is None:
        return ""
    number, _, unit = form.partition(" ")
    text = number.format(value * factor)
    if deviation is not None and figure in _SPREAD:
        text += f" ± {number.format(deviation * factor)}"
    return f"{text} {unit}".rstrip()
