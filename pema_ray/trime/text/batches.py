"""Which segments share a memory, and in which order (section 4): random, keep-order, BM25's walk. Knows numpy alone.

Everything follows from (seed, epoch): every worker computes the same groups, and takes its part of each.
S segments, G segments of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Order = Literal["random", "keep", "bm25"]


def groups_of_epoch(
    segments: int, group: int, order: Order, seed: int, epoch: int, walk_S: np.ndarray | None = None
) -> list[np.ndarray]:
    """Numbers of the segments of every group of an epoch; one group may be smaller.

    - `random`: a permutation of the segments, another one every epoch;
    - `keep`: consecutive segments, so that a group's memory is the text just before; groups in random order;
    - `bm25`: consecutive segments of the walk; groups in random order.
    """
    generator = np.random.default_rng([seed, epoch])
    if order == "random":
        return _cut(generator.permutation(segments), group)
    if order == "bm25":
        assert walk_S is not None
        assert len(walk_S) == segments
    groups = _cut(np.arange(segments) if walk_S is None or order == "keep" else walk_S, group)
    return [groups[number] for number in generator.permutation(len(groups))]


def _cut(number_S: np.ndarray, group: int) -> list[np.ndarray]:
    return [number_S[first : first + group] for first in range(0, len(number_S), group)]


def share_of(group_G: np.ndarray, rank: int, world: int) -> tuple[np.ndarray, int]:
    """A worker's consecutive part of a group, and where it begins; parts differ by one segment at most."""
    edges = [len(group_G) * r // world for r in range(world + 1)]
    return group_G[edges[rank] : edges[rank + 1]], edges[rank]


def walk(neighbours_SK: Sequence[Sequence[int]] | np.ndarray, seed: int) -> np.ndarray:
    """BM25's order of the segments `[S]`: from a random one to its nearest unused neighbour, and so on; without one, to
    a random unused segment.

    Args:
        neighbours_SK: of every segment, the nearest first; its own number and negative ones are skipped.
    """
    number = len(neighbours_SK)
    order = np.random.default_rng(seed).permutation(number)  # where the walk begins, and resumes
    used = np.zeros(number, bool)
    path = np.empty(number, np.int64)
    at, resume = -1, 0
    for place in range(number):
        following = next((n for n in neighbours_SK[at] if n >= 0 and not used[n]), None) if at >= 0 else None
        if following is None:
            while used[order[resume]]:
                resume += 1
            following = order[resume]
        at = int(following)
        used[at], path[place] = True, at
    return path
