"""Draft tokens, so that one round trip verifies several. Drafts never change an answer: every token is still chosen
from the mixture; a draft only selects the states to request in advance.

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
_LONGEST_GAP = 6  # tokens of the followed passage that an answer may skip
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
    """Drafts from the text itself (prompt, source and answer): what followed an earlier occurrence of its last tokens,
    and what comes next in the passage that the answer follows, possibly with words changed or skipped."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._next_of: dict[tuple[int, ...], int] = {}  # run of tokens -> index of what followed it last
        self._indexed = 0
        self._next: int | None = None  # index of the token expected next in the followed passage
        self._run_length = 0  # tokens that matched the passage in a row
        self._index()

    def follow(self, token: int) -> None:
        """Append a token of the answer."""
        self.ids.append(token)
        matched = self._lookup()
        if self._next is not None and self._next < len(self.ids) - 1 and self.ids[self._next] == token:
            self._next, self._run_length = self._next + 1, self._run_length + 1
        elif matched is not None:
            self._next, self._run_length = matched[1], matched[0]
        elif self._next is not None:
            upcoming = self.ids[self._next + 1 : self._next + 1 + _LONGEST_GAP]
            self._next += 2 + upcoming.index(token) if token in upcoming else 1  # words skipped, or one changed
            self._run_length = 0
        elif (place := self._next_of.get((token,))) is not None:
            self._next, self._run_length = place, 0
        self._index()

    def candidates(self, limit: int) -> list[DraftCandidate]:
        """Candidates of at most `limit` tokens, one of each kind."""
        candidates = []
        if matched := self._lookup():
            candidates.append(DraftCandidate(f"text {matched[0]}", self.ids[matched[1] : matched[1] + limit]))
        if self._next is not None and (matched is None or matched[1] != self._next):
            kind = f"along {min(self._run_length, LONGEST_MATCH)}"
            candidates.append(DraftCandidate(kind, self.ids[self._next : self._next + limit]))
        return [candidate for candidate in candidates if candidate.tokens]

    def _lookup(self) -> tuple[int, int] | None:
        """`(length, index after it)` of the longest earlier occurrence of the last tokens."""
        for n in range(LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            place = self._next_of.get(tuple(self.ids[-n:]))
            if place is not None and place < len(self.ids):
                return n, place
        return None

    def _index(self) -> None:
        """Index each run of tokens by what followed its newest occurrence."""
        for end in range(max(1, self._indexed), len(self.ids)):
            for n in range(1, LONGEST_MATCH + 1):
                if end >= n:
                    self._next_of[tuple(self.ids[end - n : end])] = end
        self._indexed = len(self.ids)


class MemoryLookup:
    """Drafts from the targets of an external memory: what most often followed the answer's last tokens there.

    Draft tokens go to the PLM owner, and with them pieces of those targets.

    Args:
        token_T: targets, example after example.
        begins_T: whether a new example begins here, or the tokens before are missing.
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
            previous = (
                np.concatenate([[example], rows.example_id[:-1]]),
                np.concatenate([[position], rows.position[:-1]]),
            )
            begins.append((rows.example_id != previous[0]) | (rows.position != previous[1] + 1))
            targets.append(rows.target)
            if len(rows):
                example, position = int(rows.example_id[-1]), int(rows.position[-1])
        if not targets:
            return cls(np.zeros(0, np.int32), np.zeros(0, bool))
        return cls(np.concatenate(targets), np.concatenate(begins))

    def __len__(self) -> int:
        return len(self._token)

    def candidates(self, answer: Sequence[int], limit: int) -> list[DraftCandidate]:
        """The candidate after the longest run of the answer's last tokens that the memory has."""
        for n in range(min(LONGEST_MATCH, len(answer)), 0, -1):
            hashes, place = self._tables[n - 1]
            hashed = _hash(np.asarray(answer[-n:], np.int64)[None])[0]
            index = int(np.searchsorted(hashes, hashed))
            if index < len(hashes) and hashes[index] == hashed:
                begin = int(place[index])
                end = min(begin + limit, int(self._ends[self._piece[begin]]))
                return [DraftCandidate(f"memory {n}", self._token[begin:end].tolist())]
        return []

    def _table(self, n: int, piece_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of all runs of n tokens, and the index of the token that follows each most often."""
        windows = len(self._token) - n
        if windows < 1:
            return np.zeros(0, np.uint64), np.zeros(0, np.int32)
        start = np.flatnonzero(piece_T[:windows] == piece_T[n:])  # the run and the next token lie in one example
        run = np.stack([self._token[start + i] for i in range(n)], 1)
        hashed, follows = _hash(run), self._token[start + n]
        order = np.lexsort((follows, hashed))
        hashed, follows, place = hashed[order], follows[order], (start + n)[order]
        is_first = np.ones(len(hashed), bool)
        is_first[1:] = (hashed[1:] != hashed[:-1]) | (follows[1:] != follows[:-1])
        first = np.flatnonzero(is_first)
        count = np.diff(np.append(first, len(hashed)))
        hashed, place = hashed[first], place[first]
        best = np.lexsort((-count, hashed))  # the commonest of each run first
        hashed, place = hashed[best], place[best]
        is_best = np.ones(len(hashed), bool)
        is_best[1:] = hashed[1:] != hashed[:-1]
        return hashed[is_best], place[is_best].astype(np.int32)


def _hash(run_Nn: np.ndarray) -> np.ndarray:
    """64 bits per run; a collision only makes a candidate worse."""
    hashes = np.zeros(len(run_Nn), np.uint64)
    with np.errstate(over="ignore"):
        for column in run_Nn.T:
            hashes = (hashes ^ (column.astype(np.uint64) + np.uint64(1))) * np.uint64(_PRIME)
            hashes ^= hashes >> np.uint64(29)
    return hashes
