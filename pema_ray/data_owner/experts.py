"""What is mixed with the PLM, named by where it lies and loaded where it is used. Knows no Ray.

An adapter; the nearest rows of a memory (kNN-LM); or an adapter that asks the memory as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pema_ray.config import NeighboursConfig
from pema_ray.data_owner.adapter import PemaAdapter
from pema_ray.data_owner.knn import NearestNeighbours, WithNeighbours
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
        neighbours: how the memory is asked; its weight counts only beside an adapter.
    """

    adapter: Path | None = None
    memory: Path | None = None
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)

    def load(self, card: ModelCard, head: LMHead) -> PemaAdapter | NearestNeighbours | WithNeighbours:
        """The expert, on the LM head's device.

        Raises:
            UserError: there is no such adapter or memory, it belongs to another PLM, or faiss is not installed.
        """
        adapter = neighbours = None
        if self.adapter is not None:
            adapter = PemaAdapter.from_pretrained(self.adapter, card).to(head.weight.device)
        if self.memory is not None:
            c, rows = self.neighbours, ExternalMemory.open(self.memory, card).view()
            neighbours = NearestNeighbours(rows, head, c.neighbours, c.temperature, c.index, c.probes)
        if adapter is not None and neighbours is not None:
            return WithNeighbours(adapter, neighbours, self.neighbours.weight)
        if adapter is None and neighbours is None:
            raise UserError("An expert needs an adapter, a memory, or both.")
        found = adapter or neighbours
        assert found is not None
        return found
