"""Draft length controller: weighs the expected accepted tokens of a draft against the time it costs.

It models a round trip's seconds as a + b·tokens + c·drafted: `tokens` go up in one message and through one forward
pass; `drafted` are the PLM's own, which cost a pass each but no round trip. It learns the three coefficients from
measured trips, and the acceptance rate of each kind of draft. Knows no sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pema_ray.data_owner.decoding.drafts import DraftCandidate

BY_PLM = "plm"
_FORGET = 0.97  # of what was known about times stays at every trip
_DOUBT = 0.5  # trips that the priors below count for
_FIRST_TRIP, _A_TOKEN, _A_DRAFTED = 0.02, 0.04, 0.3  # priors: seconds; shares of a trip
_COMES_TRUE, _TRIES = 0.6, 2.0  # prior of a kind that was never tried, and its weight in trials
_FADE, _SEEN = 0.995, 0.92  # of what was known of a kind stays at every choice, and at every try


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft of one sequence.

    Attributes:
        tokens: drafted here.
        by_plm: how many tokens the PLM owner drafts instead.
    """

    kind: str = ""
    tokens: tuple[int, ...] = ()
    by_plm: int = 0


class DraftLengthController:
    """Learns from round trips and from accepted drafts."""

    def __init__(self) -> None:
        self._seen_33, self._seen_3 = np.zeros((3, 3)), np.zeros(3)
        self._trip = _FIRST_TRIP
        self._times = np.array([1.0, _A_TOKEN, _A_DRAFTED]) * self._trip
        self._trips = 0
        self._kinds: dict[str, list[float]] = {}

    # ── learning ────────────────────────────────────────────────────────────

    def record_latency(self, seconds: float, tokens: int, drafted: int) -> None:
        """A round trip with so many tokens, after which the PLM drafted up to so many more."""
        x = np.array([1.0, tokens, drafted])
        self._seen_33 = _FORGET * self._seen_33 + np.outer(x, x)
        self._seen_3 = _FORGET * self._seen_3 + seconds * x
        if not drafted:
            self._trip = seconds if not self._trips else 0.9 * self._trip + 0.1 * seconds
            self._trips += 1
        believed = np.array([1.0, _A_TOKEN, _A_DRAFTED]) * self._trip
        scale = np.diag([1.0, 4.0, 1.0]) * _DOUBT
        self._times = np.linalg.solve(self._seen_33 + scale, self._seen_3 + scale @ believed).clip(1e-5)

    def record_acceptance(self, kind: str, tried: int, accepted: int) -> None:
        """How many of a draft's tokens were accepted; those after the first rejected one say nothing."""
        if tried:
            right, wrong = self._kinds.get(kind, [0.0, 0.0])
            self._kinds[kind] = [_SEEN * right + accepted, _SEEN * wrong + (accepted < tried)]

    def chance(self, kind: str) -> float:
        """Probability that the next token of a draft of this kind is accepted."""
        right, wrong = self._kinds.get(kind, (0.0, 0.0))
        return (right + _COMES_TRUE * _TRIES) / (right + wrong + _TRIES)

    def seconds(self, tokens: int, drafted: int = 0) -> float:
        """Of a round trip."""
        return float(self._times @ np.array([1.0, tokens, drafted]))

    # ── choosing ────────────────────────────────────────────────────────────

    def choose(self, offers: Sequence[tuple[Sequence[DraftCandidate], int, int]]) -> list[Draft]:
        """The draft of every sequence in one message that maximises expected tokens per second.

        Args:
            offers: of each sequence its candidates, its longest draft, and the longest that the PLM may make.
        """
        for seen in self._kinds.values():  # a kind that was never accepted gets another chance after a while
            seen[0] *= _FADE
            seen[1] *= _FADE
        sequences = len(offers)
        tokens_per_second = sequences / self.seconds(sequences)  # without any draft
        price = tokens_per_second * float(self._times[1])
        drafts = [self._best(candidates, limit, price) for candidates, limit, _ in offers]
        sent = sequences + sum(len(draft.tokens) for draft in drafts)
        expected = sequences + sum(self._gain(draft.kind, len(draft.tokens)) for draft in drafts)
        best, rate = 0, expected / self.seconds(sent)
        for by_plm in range(1, max((limit for _, _, limit in offers), default=0) + 1):
            expected, sent = 0.0, sequences
            for draft, (_, _, limit) in zip(drafts, offers, strict=True):
                own, theirs = self._gain(draft.kind, len(draft.tokens)), self._gain(BY_PLM, min(by_plm, limit))
                expected += 1 + max(own, theirs)
                sent += len(draft.tokens) if own >= theirs else 0
            if (found := expected / self.seconds(sent, by_plm)) > rate:
                best, rate = by_plm, found
        if best:
            for place, (draft, (_, _, limit)) in enumerate(zip(drafts, offers, strict=True)):
                by_plm = min(best, limit)
                if by_plm and self._gain(BY_PLM, by_plm) > self._gain(draft.kind, len(draft.tokens)):
                    drafts[place] = Draft(BY_PLM, (), by_plm)
        return drafts

    def _best(self, candidates: Sequence[DraftCandidate], limit: int, price: float) -> Draft:
        """The candidate with the largest gain beyond its price, cut where one more token would cost more."""
        best, gain = Draft(), 0.0
        for candidate in candidates:
            p, length, value, reached = self.chance(candidate.kind), 0, 0.0, 1.0
            for _ in candidate.tokens[:limit]:
                reached *= p
                if reached <= price:
                    break
                value += reached - price
                length += 1
            if value > gain:
                best, gain = Draft(candidate.kind, tuple(candidate.tokens[:length])), value
        return best

    def _gain(self, kind: str, length: int) -> float:
        """Expected accepted tokens of a draft: p + p² + …"""
        if not length:
            return 0.0
        p = self.chance(kind)
        return sum(p**n for n in range(1, length + 1))
