"""Guesses the next tokens, so that several are checked in one round trip. Drafts never change an answer: every token is
still drawn from the mixture, and a draft only says which states are worth asking for beforehand.

How far to guess follows from how often guesses come true.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_MATCH, _SHORTEST_MATCH = 4, 2
_FORGET = 0.8  # of what was known about acceptance stays at every guess


class PromptLookup:
    """Drafts from the text itself: what followed where its last tokens stood before (prompt, source and answer).

    Args:
        most: tokens of a draft.
    """

    def __init__(self, ids: Sequence[int], most: int) -> None:
        self._ids, self._most = list(ids), most
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._accepted = 1.0
        self._index()

    def follow(self, token: int) -> None:
        """The text goes on."""
        self._ids.append(token)
        self._index()

    def learn(self, drafted: int, accepted: int) -> None:
        """How much of a draft came true."""
        if drafted:
            self._accepted = _FORGET * self._accepted + (1 - _FORGET) * accepted / drafted

    def guess(self, room: int) -> list[int]:
        """Tokens that may follow, at most `room` of them."""
        length = min(self._most, room, max(1, round(self._most * self._accepted)))
        if length < 1:
            return []
        for n in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            at = self._after.get(tuple(self._ids[-n:]))
            if at is not None and at < len(self._ids):
                return self._ids[at : at + length]
        return []

    def _index(self) -> None:
        """Remember where each run of tokens was followed by something; the newest place counts."""
        for end in range(max(1, self._known), len(self._ids)):
            for n in range(_SHORTEST_MATCH, _LONGEST_MATCH + 1):
                if end >= n:
                    self._after[tuple(self._ids[end - n : end])] = end
        self._known = len(self._ids)
