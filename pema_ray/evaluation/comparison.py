"""PEMA beside its peers, typed, and as one Markdown table. Knows no model and no Ray."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from pema_ray.evaluation.results import Result


class Peer(Result):
    """One system on the test pairs."""

    name: str
    given: str
    """What it must be given, beside prompts."""
    nll: float | None = None
    """Nats per target token, EOS apart; none for what has no likelihood."""
    bleu: float
    chrf: float
    archaic_share: float | None = None
    train_seconds: float | None = None
    peak_bytes: int | None = None
    """Most memory held by the process that trained."""
    seconds_per_token: float | None = None
    """Of answers, with as many decoded together as `generate.batch_size`."""
    note: str = ""


class Comparison(Result):
    """Several systems on one task, with one PLM and the same pairs."""

    task: str
    plm_name: str
    train_pairs: int
    test_pairs: int
    decoding: str
    bleu_signature: str
    peers: tuple[Peer, ...] = Field(min_length=1)


_HEADER = ("system", "must be given", "NLL", "sBLEU", "chrF", "old style", "training", "peak memory", "a token")


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
        f"NLL in nats per target token. {c.bleu_signature}",
    ]
    notes = [f"- {peer.name}: {peer.note}" for peer in c.peers if peer.note]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _cells(peer: Peer) -> Sequence[str]:
    return (
        peer.name,
        peer.given,
        "" if peer.nll is None else f"{peer.nll:.3f}",
        f"{peer.bleu:.1f}",
        f"{peer.chrf:.1f}",
        "" if peer.archaic_share is None else f"{peer.archaic_share:.1%}",
        "" if peer.train_seconds is None else f"{peer.train_seconds:,.0f} s",
        "" if peer.peak_bytes is None else f"{peer.peak_bytes / 2**20:,.0f} MiB",
        "" if peer.seconds_per_token is None else f"{1000 * peer.seconds_per_token:.1f} ms",
    )
