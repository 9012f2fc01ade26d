"""Search of a datastore whose parts are spread over Ray actors; results are merged exactly. Imports Ray.

An actor that dies restarts, reads its parts from disk and answers the pending queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory
from pema_ray.memory.search.index import load_parts, parts_of, read_info
from pema_ray.memory.search.nearest import Neighbours, OnePieceSearch, SearchOptions, SearchResult, check_k, merge


def count_parts(store: ExternalMemory, index: Path | None) -> int:
    """Number of parts of a datastore: the maximum number of actors."""
    shards = len(store.counts)
    return len(parts_of(shards, read_info(index, store).shards_per_part if index else shards))


def deal(parts: int, holders: int) -> list[list[int]]:
    """Consecutive part numbers for each holder; at most as many holders as parts."""
    holders = min(holders, parts)
    return [list(range(i * parts // holders, (i + 1) * parts // holders)) for i in range(holders)]


class PartHolder:
    """One actor: holds some parts and searches them."""

    def __init__(self, folder: str, index: str | None, options: SearchOptions, numbers: list[int]) -> None:
        store = ExternalMemory.open(folder)
        self._search = OnePieceSearch(load_parts(store, None if index is None else Path(index), options, numbers))

    def rows(self) -> int:
        return len(self._search)

    def search(self, query_NH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest of its own rows, at most k: similarity, token, row."""
        nearest = self._search.search(query_NH, min(k, len(self._search)))
        return nearest.similarity_NK.numpy(), nearest.token_NK.numpy(), nearest.row_NK.numpy()


class ShardedSearch:
    """A datastore whose parts are in several actors.

    Args:
        holders: actors of `PartHolder`; entries: their total.
    """

    def __init__(self, holders: list[Any], entries: int) -> None:
        self._holders, self._entries = holders, entries

    def __len__(self) -> int:
        return self._entries

    def search(self, query_NH: np.ndarray, k: int) -> SearchResult:
        """The k nearest entries, whatever the distribution of parts."""
        import ray

        check_k(k, self._entries)
        query = ray.put(query_NH)
        answers = ray.get([holder.search.remote(query, k) for holder in self._holders])
        return merge([search_result_of(arrays) for arrays in answers], k)


def search_result_of(arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> SearchResult:
    """A holder's answer as tensors."""
    import torch

    similarity, token, row = (torch.from_numpy(np.array(part)) for part in arrays)  # Ray's arrays are read-only
    return SearchResult(similarity, token, row)


@contextmanager
def open_search(
    store: ExternalMemory, index: Path | None, options: SearchOptions, actors: int, cpus_per_actor: float = 1
) -> Iterator[Neighbours]:
    """A datastore, ready to be searched: in this process, or by actors for the time of the block.

    Args:
        index: its folder; None: every key is compared.
        actors: 0: none, this process holds everything. Ray must be running otherwise.
    """
    if not actors:
        yield OnePieceSearch(load_parts(store, index, options))
        return
    import ray
    from ray.exceptions import RayTaskError

    actor: Any = ray.remote(num_cpus=cpus_per_actor, max_restarts=-1, max_task_retries=-1)(PartHolder)
    folders = (str(store.folder.absolute()), None if index is None else str(index.absolute()))
    holders = [actor.remote(*folders, options, numbers) for numbers in deal(count_parts(store, index), actors)]
    try:
        yield ShardedSearch(holders, sum(ray.get([holder.rows.remote() for holder in holders])))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for holder in holders:
            ray.kill(holder)
