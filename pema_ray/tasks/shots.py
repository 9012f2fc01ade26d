"""Which training pairs a prompt shows as worked examples: the same few for every source, or those most like it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from pema_ray.errors import UserError
from pema_ray.tasks.sources import Pair

_MODERATE = range(61, 120)  # characters of a source that shows much and takes little room


def first_shots(pairs: Iterable[Pair], shots: int) -> list[Pair]:
    """`shots` worked examples: the first pairs, by number, of moderate length whose target differs from the source.

    Where there are too few of them, others whose length is nearest to a moderate one.

    Raises:
        UserError: there are fewer pairs than shots.
    """

    def unfitness(pair: Pair) -> tuple[bool, int, int]:
        length = len(pair.source)
        off = max(_MODERATE[0] - length, length - _MODERATE[-1], 0)
        return pair.source == pair.target, off, pair.example_id

    chosen = heapq.nsmallest(shots, pairs, key=unfitness)
    if len(chosen) < shots:
        raise UserError(f"task.shots={shots}, but there are only {len(chosen)} training pairs to be shown.")
    return sorted(chosen, key=lambda pair: pair.example_id)


class SimilarShots:
    """The pairs whose sources are most like the one asked about, by BM25 over words; the likest stands last.

    Args:
        pairs: to choose from: the training pairs.
        shots: how many are shown.

    Raises:
        UserError: there are not more pairs than shots.
    """

    def __init__(self, pairs: Sequence[Pair], shots: int) -> None:
        if len(pairs) <= shots:
            raise UserError(
                f"task.shots={shots} with task.show=similar needs more than {shots} training pairs; there are "
                f"{len(pairs)}."
            )
        self.pairs, self.shots = sorted(pairs, key=lambda pair: pair.example_id), shots

    @cached_property
    def _index(self) -> Any:
        import bm25s

        index = bm25s.BM25()
        index.index(_words([pair.source for pair in self.pairs]), show_progress=False)
        return index

    def like(self, source: str, example_id: int | None = None) -> list[Pair]:
        """The pairs to show before a source.

        Args:
            example_id: of the source itself, which is never shown.
        """
        words = _words([source])
        if not any(word in self._index.vocab_dict for word in words[0]):  # nothing is like it
            words = [[next(iter(self._index.vocab_dict))]]
        found, _ = self._index.retrieve(words, k=self.shots + 1, show_progress=False)
        chosen = [self.pairs[place] for place in found[0].tolist()]
        shown = [pair for pair in chosen if pair.example_id != example_id]
        return shown[: self.shots][::-1]


def _words(texts: Sequence[str]) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords=[], return_ids=False, show_progress=False)
