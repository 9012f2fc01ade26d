"""Which training pairs a prompt shows as worked examples: the same few for every source, or those most like it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from pema_ray.errors import UserError
from pema_ray.tasks.sources import Pair


def first_shots(pairs: Iterable[Pair], shots: int, longest: int = 120) -> list[Pair]:
    """`shots` worked examples: the first pairs, by number, of moderate length whose target differs from the source."""
    fitting = (pair for pair in pairs if 60 < len(pair.source) < longest and pair.source != pair.target)
    chosen = heapq.nsmallest(shots, fitting, key=lambda pair: pair.example_id)
    if len(chosen) < shots:
        raise UserError(
            f"task.shots={shots}, but only {len(chosen)} training pairs are of a length to be shown "
            f"(60 to {longest} characters)."
        )
    return chosen


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
            example_id: of the source itself, which is never shown. Splits count alike: another pair of that number is.
        """
        words = _words([source])
        if not any(word in self._index.vocab_dict for word in words[0]):  # nothing is like it
            words = [[next(iter(self._index.vocab_dict))]]
        found, _ = self._index.retrieve(words, k=self.shots + 1, show_progress=False)
        chosen = [self.pairs[place] for place in found[0].tolist()]
        shown = [pair for pair in chosen if (pair.example_id, pair.source) != (example_id, source)]
        return shown[: self.shots][::-1]


def _words(texts: Sequence[str]) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords=[], return_ids=False, show_progress=False)
