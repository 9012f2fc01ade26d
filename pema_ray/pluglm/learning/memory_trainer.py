"""Base of pre-training and fine-tuning: a model, the versions of its memory, sums over processes. Imports no Ray."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from pema_ray.pluglm.config import MemoryTrainingConfig
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.model.knowledge import Knowledge
from pema_ray.training.history import TrainerHistory
from pema_ray.training.schedules import learning_rate
from pema_ray.training.trainer import Trainer

S = TypeVar("S", bound=MemoryTrainingConfig)


@dataclass(frozen=True)
class MemoryAccess:
    """Functions by which a training uses the memory."""

    open: Callable[[int], Knowledge]
    """Open a version; every process calls it."""
    refresh: Callable[[DocumentEncoder], int]
    """Encode all documents again, publish and return the version; the leading process calls it."""
    prune: Callable[[Sequence[int]], object]
    """Keep these versions and the current one; the leading process calls it."""
    first: int
    """The initial version."""


class MemoryTrainer(Trainer[S, TrainerHistory]):
    """Trains a model and refreshes its memory meanwhile.

    Attributes:
        memory: None: no memory.
        frozen: whether the memory is never refreshed.
        name: the encoder's name in published versions.
        version: the attached version of the memory.
    """

    tokenizer: Any
    memory: MemoryAccess | None
    frozen: bool
    name: str
    version: int

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def learning_rate(self, step: int) -> float:
        c = self.settings
        return learning_rate(
            step, c.schedule, c.learning_rate, total_steps=self.steps, warm_up_steps=c.warm_up_steps, power=c.power
        )

    @abstractmethod
    def refreshes_after(self, step: int) -> bool:
        """Whether the memory is refreshed after the `step`-th step."""

    # ── memory ──────────────────────────────────────────────────────────────

    def attach(self, version: int) -> None:
        """Attach a version of the memory."""
        self.version = version
        self.model.attach(self.memory.open(version) if self.memory else None, allow_stale=not self.frozen)

    def refresh(self) -> None:
        """Encode the memory with the current model; all processes attach the new version."""
        if self.memory is None or self.frozen:
            return
        version = torch.zeros(1, dtype=torch.int64, device=self.place.device)
        if self.place.leads:
            version[0] = self.memory.refresh(DocumentEncoder(self.model, self.tokenizer, self.name))
        self.attach(int(self.place.broadcast(version)))

    # ── a step ──────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        self.attach(self.version)

    def after_step(self, step: int) -> None:
        self._share_statistics()
        if self.refreshes_after(step):
            self.refresh()

    def precision(self) -> Any:
        is_bfloat16 = self.settings.precision == "bfloat16"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=is_bfloat16)

    def sum_number(self, value: float) -> float:
        """Sum over all processes."""
        return float(self.place.all_reduce(torch.tensor(value, dtype=torch.float64, device=self.place.device)))

    def _share_statistics(self) -> None:
        """Average BatchNorm's running statistics over processes."""
        if self.place.world == 1:
            return
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    self.place.all_reduce(statistic).div_(self.place.world)

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: weight decay on matrices alone."""
        return [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]

    # ── checkpoints ─────────────────────────────────────────────────────────

    def take_best(self) -> None:
        """Nothing: the model after the last step stays."""

    def state(self) -> dict[str, Any]:
        return {"memory_version": self.version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.attach(state["memory_version"])

    def after_save(self) -> None:
        if self.place.leads and self.memory is not None:  # not earlier: the previous checkpoint needs its version
            self.memory.prune(self.versions_needed())

    def versions_needed(self) -> list[int]:
        """Versions of the memory that the checkpoint needs."""
        return [self.version]
