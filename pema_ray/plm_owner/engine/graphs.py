"""Graphs of representations whose gradient is expected: a cache between an extraction and its gradient.

Without its graph, a gradient computes the same forward passes again, and is the same. n prefix positions, W numbers of
each, N rows, H hidden.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pema_ray.plm_owner.model.load import LoadedPLM

Key = tuple[str, Hashable]


@dataclass(frozen=True, eq=False)
class Graph:
    """One forward pass behind a prefix.

    Attributes:
        embeddings_nW: the prefix, a leaf.
        state_NH: the requested representations.
        nbytes: of the prefix and the tensors that the backward pass needs, without the PLM's weights.
    """

    embeddings_nW: torch.Tensor
    state_NH: torch.Tensor
    nbytes: int

    def backward(self, d_state_NH: torch.Tensor) -> torch.Tensor:
        """`Jᵀ D`, `[n, W]`; once, as it frees the graph."""
        (gradient_nW,) = torch.autograd.grad(self.state_NH, self.embeddings_nW, d_state_NH.to(self.state_NH))
        return gradient_nW


class Graphs:
    """What is kept of every batch, the oldest dropped first.

    Args:
        budget: bytes, over all data owners; 0: nothing is kept.
        seconds: after which a batch without its gradient is dropped.
        clock: monotonic seconds.
    """

    def __init__(self, budget: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._seconds, self._clock = budget, seconds, clock
        self._kept: OrderedDict[Key, dict[int, Graph]] = OrderedDict()
        self._begun: dict[Key, float] = {}

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(graph.nbytes for graphs in self._kept.values() for graph in graphs.values())

    def keep(self, owner: str, batch_key: Hashable, pass_number: int, graph: Graph) -> None:
        """Keep the graph of one of a batch's passes, if it fits beside those of the same batch."""
        key = owner, batch_key
        own = sum(kept.nbytes for kept in self._kept.get(key, {}).values())
        if own + graph.nbytes > self._budget:
            return
        self._kept.setdefault(key, {})[pass_number] = graph
        self._kept.move_to_end(key)
        self._begun.setdefault(key, self._clock())
        while self.nbytes > self._budget:
            self._drop(next(iter(self._kept)))

    def take(self, owner: str, key: Hashable, pass_number: int) -> Graph | None:
        """What is kept of one of a batch's passes; it is kept no longer."""
        graphs = self._kept.get((owner, key), {})
        graph = graphs.pop(pass_number, None)
        if not graphs:
            self._drop((owner, key))
        return graph

    def clear(self) -> int:
        """Drop all, where memory is needed; returns the bytes."""
        nbytes = self.nbytes
        self._kept.clear()
        self._begun.clear()
        return nbytes

    def forget(self) -> None:
        """Drop batches whose gradient did not come."""
        oldest = self._clock() - self._seconds
        for key in [key for key, begun in self._begun.items() if begun < oldest]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._kept.pop(key, None)
        self._begun.pop(key, None)


@contextmanager
def measured(plm: LoadedPLM) -> Iterator[Callable[[], int]]:
    """Yields what tells the bytes that the graphs of the block hold, without the PLM's weights."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in plm.model.parameters()}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: total
