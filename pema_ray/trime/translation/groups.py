"""Which sentences share a memory: along BM25's walk, or sentences of about the same length. Imports no Ray.

Groups are cut once, and come in another order every epoch; everything follows from (seed, epoch). S sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pema_ray.errors import UserError
from pema_ray.trime.stages.batches import build_index, load_index, search
from pema_ray.trime.text.batches import walk
from pema_ray.trime.translation.config import MtBatchesConfig
from pema_ray.trime.translation.data import Parallel

_AT_A_TIME = 4096  # queries of one search


def bm25_walk(pairs: Parallel, neighbours: int, seed: int, folder: Path) -> np.ndarray:
    """The order of the training sentences `[S]` that goes from each target to its nearest unused one.

    Raises:
        UserError: there are too few sentences.
    """
    if len(pairs) < 3:
        raise UserError(
            f"batches.order=bm25: {len(pairs)} training pairs are too few to search for similar ones. Take more, or "
            "batches.order=random."
        )
    corpus: Any = pairs  # a search needs of segments what pairs have too: their number and their tokens
    build_index(corpus, folder)
    retriever = load_index(folder)
    parts = [
        search(retriever, corpus, range(first, min(first + _AT_A_TIME, len(pairs))), neighbours)
        for first in range(0, len(pairs), _AT_A_TIME)
    ]
    return walk(np.concatenate(parts), seed)


def cut(order_S: Sequence[int] | np.ndarray, lengths: Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Consecutive sentences of the order, with at most `max_tokens` positions padded to the longest of each group."""
    groups: list[np.ndarray] = []
    first, longest = 0, 0
    for place, number in enumerate(order_S):
        longest = max(longest, lengths[number])
        if place > first and longest * (place - first + 1) > max_tokens:
            groups.append(np.asarray(order_S[first:place]))
            first, longest = place, lengths[number]
    if len(order_S):
        groups.append(np.asarray(order_S[first:]))
    return groups


def groups_of(pairs: Parallel, config: MtBatchesConfig, seed: int, walk_S: np.ndarray | None) -> list[np.ndarray]:
    """The sentences of every group."""
    lengths = [len(target) + 1 for target in pairs.target]
    if max(lengths) > config.max_tokens:
        raise UserError(
            f"batches.max_tokens={config.max_tokens}: the longest training target has {max(lengths)} tokens. Raise it."
        )
    if config.order == "bm25":
        assert walk_S is not None
        assert len(walk_S) == len(pairs)
        return cut(walk_S, lengths, config.max_tokens)
    mixed = np.random.default_rng(seed).permutation(len(pairs))
    return cut(mixed[np.argsort(np.array(lengths)[mixed], kind="stable")], lengths, config.max_tokens)
