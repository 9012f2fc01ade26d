"""Draft tokens, so that one round trip verifies several. Drafts never change an answer: every token is still chosen
from the mixture, and a draft only says which states to request beforehand.

Candidates come from the text itself and from the external memory; `draft_length.py` decides how much of which to use.
Knows no sessions and no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pema_ray.memory import ExternalMemory

LONGEST_MATCH = 4
_SHORTEST_MATCH = 2
_LONGEST_GAP = 6  # tokens that an answer leaves out of what it follows
_PRIME = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class DraftCandidate:
    """Tokens that may follow.

    Attributes:
        kind: their origin; candidates of one kind are accepted about equally often.
    """

    kind: str
    tokens: list[int]


class PromptLookup:
    """Drafts from the text itself (prompt, source and answer): what followed where its last tokens stood before, and
    what comes next in the passage that the answer has been following, with a word changed or left out here and there.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._at: int | None = None
        self._run = 0
        self._index()

    def follow(self, token: int) -> None:
        """The text goes on."""
        self.ids.append(token)
        matched = self._lookup(LONGEST_MATCH, _SHORTEST_MATCH)
        if self._at is not None and self._at < len(self.ids) - 1 and self.ids[self._at] == token:
            self._at, self._run = self._at + 1, self._run + 1
        elif matched is not None:
            self._at, self._run = matched[1], matched[0]
        elif self._at is not None:
            ahead = self.ids[self._at + 1 : self._at + 1 + _LONGEST_GAP]
            self._at += 2 + ahead.index(token) if token in ahead else 1  # something left out, or put otherwise
            self._run = 0
        elif (found := self._after.get((token,))) is not None:
            self._at, self._run = found, 0
        self._index()

    def candidates(self, room: int) -> list[DraftCandidate]:
        """Candidates of at most `room` tokens, one of each kind."""
        found = []
        if matched := self._lookup(LONGEST_MATCH, _SHORTEST_MATCH):
            found.append(DraftCandidate(f"text {matched[0]}", self.ids[matched[1] : matched[1] + room]))
        if self._at is not None and (matched is None or matched[1] != self._at):
            found.append(DraftCandidate(f"along {min(self._run, LONGEST_MATCH)}", self.ids[self._at : self._at + room]))
        return [candidate for candidate in found if candidate.tokens]

    def _lookup(self, longest: int, shortest: int) -> tuple[int, int] | None:
        """How many of the last tokens stood together before, and the place after them; the longest match counts."""
        for n in range(longest, shortest - 1, -1):
            at = self._after.get(tuple(self.ids[-n:]))
            if at is not None and at < len(self.ids):
                return n, at
        return None

    def _index(self) -> None:
        """Remember where each run of tokens was followed by something; the newest place counts."""
        for end in range(max(1, self._known), len(self.ids)):
            for n in range(1, LONGEST_MATCH + 1):
                if end >= n:
                    self._after[tuple(self.ids[end - n : end])] = end
        self._known = len(self.ids)


class MemoryLookup:
    """Drafts from the targets of an external memory: what most often followed the answer's last tokens there.

    Draft tokens go to the PLM owner, and with them pieces of those targets.

    Args:
        token_T: targets, example after example.
        begins_T: whether a new example, or a gap within one, begins here.
    """

    def __init__(self, token_T: np.ndarray, begins_T: np.ndarray) -> None:
        self._token = np.ascontiguousarray(token_T, np.int32)
        piece = np.cumsum(begins_T)
        self._ends = np.append(np.flatnonzero(begins_T)[1:], len(token_T)) if len(token_T) else np.zeros(0, np.int64)
        self._piece = piece - 1
        self._tables = [self._table(n, piece) for n in range(1, LONGEST_MATCH + 1)]

    @classmethod
    def of(cls, memory: ExternalMemory) -> MemoryLookup:
        """Of a memory's rows."""
        targets, begins = [], []
        example, position = -1, -1
        for rows in memory.shards():
            before = np.concatenate([[example], rows.example_id[:-1]]), np.concatenate([[position], rows.position[:-1]])
            begins.append((rows.example_id != before[0]) | (rows.position != before[1] + 1))
            targets.append(rows.target)
            if len(rows):
                example, position = int(rows.example_id[-1]), int(rows.position[-1])
        if not targets:
            return cls(np.zeros(0, np.int32), np.zeros(0, bool))
        return cls(np.concatenate(targets), np.concatenate(begins))

    def __len__(self) -> int:
        return len(self._token)

    def candidates(self, answer: Sequence[int], room: int) -> list[DraftCandidate]:
        """The candidate after the longest known run of the answer's last tokens."""
        for n in range(min(LONGEST_MATCH, len(answer)), 0, -1):
            hashes, place = self._tables[n - 1]
            wanted = _hash(np.asarray(answer[-n:], np.int64)[None])[0]
            at = int(np.searchsorted(hashes, wanted))
            if at < len(hashes) and hashes[at] == wanted:
                begin = int(place[at])
                end = min(begin + room, int(self._ends[self._piece[begin]]))
                return [DraftCandidate(f"memory {n}", self._token[begin:end].tolist())]
        return []

    def _table(self, n: int, piece_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all runs of n tokens, ordered, and the place of the token that follows each most often."""
        windows = len(self._token) - n
        if windows < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32)
        start = np.flatnonzero(piece_T[:windows] == piece_T[n:])  # with what follows, all of one example
        run = np.stack([self._token[start + i] for i in range(n)], 1)
        hashed, follows = _hash(run), self._token[start + n]
        order = np.lexsort((follows, hashed))
        hashed, follows, place = hashed[order], follows[order], (start + n)[order]
        new = np.ones(len(hashed), bool)
        new[1:] = (hashed[1:] != hashed[:-1]) | (follows[1:] != follows[:-1])
        first = np.flatnonzero(new)
        count = np.diff(np.append(first, len(hashed)))
        hashed, place = hashed[first], place[first]
        best = np.lexsort((-count, hashed))  # of each run, the commonest first
        hashed, place = hashed[best], place[best]
        kept = np.ones(len(hashed), bool)
        kept[1:] = hashed[1:] != hashed[:-1]
        return hashed[kept], place[kept].astype(np.int32)


def _hash(run_Nn: np.ndarray) -> np.ndarray:
    """64 bits a run; a collision only makes a candidate worse."""
    found = np.zeros(len(run_Nn), np.uint64)
    with np.errstate(over="ignore"):
        for column in run_Nn.T:
            found = (found ^ (column.astype(np.uint64) + np.uint64(1))) * np.uint64(_PRIME)
            found ^= found >> np.uint64(29)
    return found
