"""Decides how far to guess: what a guess brings, by how often its kind came true, against the time it costs.

A round trip's seconds are taken as a + b·tokens + c·drafted: `tokens` go up in one message and through one forward
pass, `drafted` are the PLM's own, which cost it a pass each but no round trip. The three are learned from trips as they
are made, and so is how often each kind of guess comes true. Knows nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pema_ray.data_owner.serving.drafts import Guess

BY_PLM = "plm"
_FORGET = 0.97  # of what was known about times stays at every trip
_DOUBT = 0.5  # trips that the beliefs below count for
_FIRST_TRIP, _A_TOKEN, _A_DRAFTED = 0.02, 0.04, 0.3  # believed at first: seconds; shares of a trip
_COMES_TRUE, _TRIES = 0.6, 2.0  # believed of a kind that was never tried, and how firmly
_FADE, _SEEN = 0.995, 0.92  # of what was known of a kind stays at every choice, and at every try


@dataclass(frozen=True, slots=True)
class Bet:
    """What one sequence sends along.

    Attributes:
        tokens: guessed here.
        draft: tokens that the PLM is to guess.
    """

    kind: str = ""
    tokens: tuple[int, ...] = ()
    draft: int = 0


class Pace:
    """Learns from round trips and from guesses."""

    def __init__(self) -> None:
        self._seen_33, self._seen_3 = np.zeros((3, 3)), np.zeros(3)
        self._trip = _FIRST_TRIP
        self._times = np.array([1.0, _A_TOKEN, _A_DRAFTED]) * self._trip
        self._trips = 0
        self._kinds: dict[str, list[float]] = {}

    # ── learning ────────────────────────────────────────────────────────────

    def took(self, seconds: float, tokens: int, drafted: int) -> None:
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

    def came_true(self, kind: str, tried: int, accepted: int) -> None:
        """How much of a guess was right; what lies behind the first wrong token says nothing."""
        if tried:
            right, wrong = self._kinds.get(kind, [0.0, 0.0])
            self._kinds[kind] = [_SEEN * right + accepted, _SEEN * wrong + (accepted < tried)]

    def chance(self, kind: str) -> float:
        """That the next token of a guess of this kind is right."""
        right, wrong = self._kinds.get(kind, (0.0, 0.0))
        return (right + _COMES_TRUE * _TRIES) / (right + wrong + _TRIES)

    def seconds(self, tokens: int, drafted: int = 0) -> float:
        """Of a round trip."""
        return float(self._times @ np.array([1.0, tokens, drafted]))

    # ── choosing ────────────────────────────────────────────────────────────

    def choose(self, offers: Sequence[tuple[Sequence[Guess], int, int]]) -> list[Bet]:
        """What every sequence of one message sends along, so that most tokens come of a second.

        Args:
            offers: of each sequence its guesses, the most tokens it may guess, and the most that the PLM may draft.
        """
        for seen in self._kinds.values():  # who was never right gets another chance after a while
            seen[0] *= _FADE
            seen[1] *= _FADE
        sequences = len(offers)
        worth = sequences / self.seconds(sequences)  # tokens a second without any guess
        price = worth * float(self._times[1])
        bets = [self._best(guesses, most, price) for guesses, most, _ in offers]
        tokens = sequences + sum(len(bet.tokens) for bet in bets)
        come = sequences + sum(self._brings(bet.kind, len(bet.tokens)) for bet in bets)
        best, rate = 0, come / self.seconds(tokens)
        for draft in range(1, max((most for _, _, most in offers), default=0) + 1):
            own, guessed = 0.0, 0
            for bet, (_, _, most) in zip(bets, offers, strict=True):
                mine, theirs = self._brings(bet.kind, len(bet.tokens)), self._brings(BY_PLM, min(draft, most))
                own += 1 + max(mine, theirs)
                guessed += len(bet.tokens) if mine >= theirs else 0
            if (found := own / self.seconds(sequences + guessed, draft)) > rate:
                best, rate = draft, found
        if best:
            for place, (bet, (_, _, most)) in enumerate(zip(bets, offers, strict=True)):
                draft = min(best, most)
                if draft and self._brings(BY_PLM, draft) > self._brings(bet.kind, len(bet.tokens)):
                    bets[place] = Bet(BY_PLM, (), draft)
        return bets

    def _best(self, guesses: Sequence[Guess], most: int, price: float) -> Bet:
        """The guess that brings most beyond its price, cut where another token would cost more than it brings."""
        best, gain = Bet(), 0.0
        for guess in guesses:
            p, length, value, reached = self.chance(guess.kind), 0, 0.0, 1.0
            for _ in guess.tokens[:most]:
                reached *= p
                if reached <= price:
                    break
                value += reached - price
                length += 1
            if value > gain:
                best, gain = Bet(guess.kind, tuple(guess.tokens[:length])), value
        return best

    def _brings(self, kind: str, length: int) -> float:
        """Expected tokens of a guess that come true: p + p² + …"""
        if not length:
            return 0.0
        p = self.chance(kind)
        return sum(p**n for n in range(1, length + 1))
