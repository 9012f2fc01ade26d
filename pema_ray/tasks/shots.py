"""Chooses the training pairs that prompts show as examples: the same for every source, or the most similar to it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from pema_ray.errors import UserError
from pema_ray.tasks.sources import Pair

_MODERATE = range(61, 120)  # characters of a source that is informative but short


def first_shots(pairs: Iterable[Pair], shots: int) -> list[Pair]:
    """`shots` examples: the first pairs, by id, of moderate length whose target differs from the source.

    If there are too few, those nearest to moderate length complete them.

    Raises:
        UserError: there are fewer pairs than shots.
    """

    def unfitness(pair: Pair) -> tuple[bool, int, int]:
        length = len(pair.source)
        distance = max(_MODERATE[0] - length, length - _MODERATE[-1], 0)
        return pair.source == pair.target, distance, pair.example_id

    examples = heapq.nsmallest(shots, pairs, key=unfitness)
    if len(examples) < shots:
        raise UserError(f"task.shots={shots}, but there are only {len(examples)} training pairs.")
    return sorted(examples, key=lambda pair: pair.example_id)


class SimilarShots:
    """The pairs whose sources are most similar to a given one, by BM25 over words; the most similar stands last.

    Args:
        pairs: the training pairs, to choose from.
        shots: number of examples.

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
            example_id: of the source, if it is a training pair: that pair is never shown.
        """
        words = _words([source])
        if not any(word in self._index.vocab_dict for word in words[0]):  # no pair shares a word with it
            words = [[next(iter(self._index.vocab_dict))]]
        places, _ = self._index.retrieve(words, k=self.shots + 1, show_progress=False)
        candidates = [self.pairs[i] for i in places[0].tolist()]
        examples = [pair for pair in candidates if pair.example_id != example_id]
        return examples[: self.shots][::-1]


def _words(texts: Sequence[str]) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords=[], return_ids=False, show_progress=False)
