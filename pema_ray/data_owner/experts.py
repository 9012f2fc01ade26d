"""What is mixed with the PLM, named by where it lies and loaded where it is used. Knows no Ray.

An adapter; the nearest rows of a memory (kNN-LM); or an adapter that asks the memory as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pema_ray.config import KnnMixConfig
from pema_ray.data_owner.adapter import PemaAdapter
from pema_ray.data_owner.knn import NearestNeighbours, WithNeighbours, require_faiss
from pema_ray.data_owner.reading import Reading
from pema_ray.errors import UserError
from pema_ray.line import ContextSource, LMHead, ModelCard
from pema_ray.memory import ExternalMemory


class Expert(Protocol):
    """Says what comes next, from what the PLM owner sends."""

    def begin(self, source: ContextSource, prompts: Sequence[Sequence[int]], head: LMHead) -> Reading:
        """Go along with sequences that are being decoded."""
        ...


@dataclass(frozen=True)
class ExpertSpec:
    """An adapter's folder, a memory's folder, or both.

    Attributes:
        knn: how the memory is asked; its weight counts beside an adapter, and 0 leaves the memory out.
        max_examples: the first so many examples of the memory only.
    """

    adapter: Path | None = None
    memory: Path | None = None
    knn: KnnMixConfig = field(default_factory=KnnMixConfig)
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if self.adapter is None and self.memory is None:
            raise UserError("An expert needs an adapter, a memory, or both.")

    def check(self, card: ModelCard) -> None:
        """Refuse what `load` would refuse, without reading a memory's rows or building an index."""
        if self.adapter is not None:
            PemaAdapter.from_pretrained(self.adapter, card)
        if self._asks_memory:
            require_faiss()
            ExternalMemory.open(str(self.memory), card)

    def load(self, card: ModelCard, head: LMHead) -> PemaAdapter | NearestNeighbours | WithNeighbours:
        """The expert, on the LM head's device.

        Raises:
            UserError: there is no such adapter or memory, it belongs to another PLM, or faiss is not installed.
        """
        adapter = None
        if self.adapter is not None:
            adapter = PemaAdapter.from_pretrained(self.adapter, card).to(head.weight.device)
            if not self._asks_memory:
                return adapter
        c, memory = self.knn, ExternalMemory.open(str(self.memory), card)
        rows = memory.view(max_examples=self.max_examples)
        neighbours = NearestNeighbours(rows, head, c.neighbours, c.temperature, c.index, c.probes)
        return neighbours if adapter is None else WithNeighbours(adapter, neighbours, c.weight)

    @property
    def _asks_memory(self) -> bool:
        return self.memory is not None and (self.adapter is None or self.knn.weight > 0)
