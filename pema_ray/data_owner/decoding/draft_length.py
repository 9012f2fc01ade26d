"""Draft length controller: weighs the expected accepted tokens of a draft against the time it costs.

It models a round trip's seconds as a + b·tokens + c·drafted: `tokens` go up in one message and through one forward
pass; the PLM drafts `drafted` more, at a pass each but no round trip. It learns the three coefficients from measured
trips, and the acceptance rate of each kind of draft. Knows no sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pema_ray.data_owner.decoding.drafts import DraftCandidate

BY_PLM = "plm"
_LATENCY_DECAY = 0.97  # of past trips' weight, at every trip
_PRIOR_TRIPS = 0.5  # weight of the priors below, in trips
_PRIOR_SECONDS, _PER_TOKEN, _PER_DRAFTED = 0.02, 0.04, 0.3  # of a trip; the others are shares of it
_PRIOR_ACCEPTANCE, _PRIOR_TRIALS = 0.6, 2.0  # of an untried kind, and its weight in trials
_CHOICE_DECAY, _TRIAL_DECAY = 0.995, 0.92  # of a kind's past trials, at every choice and at every trial


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
        self._xtx_33, self._xty_3 = np.zeros((3, 3)), np.zeros(3)
        self._trip_seconds = _PRIOR_SECONDS
        self._coefficients = np.array([1.0, _PER_TOKEN, _PER_DRAFTED]) * self._trip_seconds
        self._trips = 0
        self._trials: dict[str, list[float]] = {}

    # ── learning ────────────────────────────────────────────────────────────

    def record_latency(self, seconds: float, tokens: int, drafted: int) -> None:
        """Learn from a round trip with this many tokens, after which the PLM drafted up to `drafted` more."""
        x = np.array([1.0, tokens, drafted])
        self._xtx_33 = _LATENCY_DECAY * self._xtx_33 + np.outer(x, x)
        self._xty_3 = _LATENCY_DECAY * self._xty_3 + seconds * x
        if not drafted:
            self._trip_seconds = seconds if not self._trips else 0.9 * self._trip_seconds + 0.1 * seconds
            self._trips += 1
        prior = np.array([1.0, _PER_TOKEN, _PER_DRAFTED]) * self._trip_seconds
        scale = np.diag([1.0, 4.0, 1.0]) * _PRIOR_TRIPS
        self._coefficients = np.linalg.solve(self._xtx_33 + scale, self._xty_3 + scale @ prior).clip(1e-5)

    def record_acceptance(self, kind: str, tried: int, accepted: int) -> None:
        """Learn how many of a draft's tokens were accepted; those after the first rejected one do not count."""
        if tried:
            before, rejected = self._trials.get(kind, [0.0, 0.0])
            self._trials[kind] = [_TRIAL_DECAY * before + accepted, _TRIAL_DECAY * rejected + (accepted < tried)]

    def acceptance(self, kind: str) -> float:
        """Probability that the next token of a draft of this kind is accepted."""
        accepted, rejected = self._trials.get(kind, (0.0, 0.0))
        return (accepted + _PRIOR_ACCEPTANCE * _PRIOR_TRIALS) / (accepted + rejected + _PRIOR_TRIALS)

    def seconds(self, tokens: int, drafted: int = 0) -> float:
        """Of a round trip."""
        return float(self._coefficients @ np.array([1.0, tokens, drafted]))

    # ── choosing ────────────────────────────────────────────────────────────

    def choose(self, offers: Sequence[tuple[Sequence[DraftCandidate], int, int]]) -> list[Draft]:
        """The draft of every sequence in one message that maximises expected tokens per second.

        Args:
            offers: `(candidates, longest draft, longest draft by the PLM)` of each sequence.
        """
        for trials in self._trials.values():  # rejected kinds are tried again after a while
            trials[0] *= _CHOICE_DECAY
            trials[1] *= _CHOICE_DECAY
        sequences = len(offers)
        tokens_per_second = sequences / self.seconds(sequences)  # without any draft
        price = tokens_per_second * float(self._coefficients[1])
        drafts = [self._best(candidates, limit, price) for candidates, limit, _ in offers]
        sent = sequences + sum(len(draft.tokens) for draft in drafts)
        expected = sequences + sum(self._gain(draft.kind, len(draft.tokens)) for draft in drafts)
        best, rate = 0, expected / self.seconds(sent)
        for by_plm in range(1, max((limit for _, _, limit in offers), default=0) + 1):
            expected, sent = 0.0, sequences
            for draft, (_, _, limit) in zip(drafts, offers, strict=True):
                gain, plm_gain = self._gain(draft.kind, len(draft.tokens)), self._gain(BY_PLM, min(by_plm, limit))
                expected += 1 + max(gain, plm_gain)
                sent += len(draft.tokens) if gain >= plm_gain else 0
            if (plm_rate := expected / self.seconds(sent, by_plm)) > rate:
                best, rate = by_plm, plm_rate
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
            p, length, value, reached = self.acceptance(candidate.kind), 0, 0.0, 1.0
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
        p = self.acceptance(kind)
        return sum(p**n for n in range(1, length + 1))
