"""What pre-training and fine-tuning share: a model, the versions of its memory, all processes' sums. Imports no Ray."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings
from pema_ray.pluglm.finetune_config import FinetuneSettings
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.model.knowledge import Knowledge
from pema_ray.training.checkpoint import load_checkpoint, save_checkpoint
from pema_ray.training.schedules import learning_rate
from pema_ray.training.strategies import Place, Strategy

Tell = Callable[[str, Mapping[str, Any]], None]
S = TypeVar("S", PretrainSettings, FinetuneSettings)
_MODEL, _OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class MemoryAccess:
    """How a training reaches the memory."""

    open: Callable[[int], Knowledge]
    """A version; every process asks."""
    refresh: Callable[[DocumentEncoder], int]
    """Encode all documents anew and publish that; the leading process asks. Returns the version."""
    prune: Callable[[Sequence[int]], object]
    """Keep these versions and the current one; the leading process asks."""
    first: int
    """The version to begin with."""


class MemoryTrainer(ABC, Generic[S]):
    """A training of a model whose memory is encoded anew as it learns.

    Attributes:
        model: lies on the place's device.
        memory: none: the model goes without.
        frozen: whether the memory stays as it is.
        name: of the encoder, in the versions that it makes.
        version: of the memory, that the model uses.
    """

    model: Any
    tokenizer: Any
    settings: S
    memory: MemoryAccess | None
    frozen: bool
    name: str
    seed: int
    place: Place
    version: int
    strategy: Strategy

    @property
    @abstractmethod
    def steps(self) -> int:
        """Of the optimiser, in the whole training."""

    @abstractmethod
    def make_strategy(self) -> Strategy:
        """Once the model's weights are those to begin with: DeepSpeed keeps copies of its own."""

    # ── memory ──────────────────────────────────────────────────────────────

    def attach(self, version: int) -> None:
        """Use a version of the memory."""
        self.version = version
        self.model.attach(self.memory.open(version) if self.memory else None, allow_stale=not self.frozen)

    def refresh(self) -> None:
        """Encode the memory with the model as it is now; all processes go on with the new version together."""
        if self.memory is None or self.frozen:
            return
        version = torch.zeros(1, dtype=torch.int64, device=self.place.device)
        if self.place.leads:
            version[0] = self.memory.refresh(DocumentEncoder(self.model, self.tokenizer, self.name))
        if self.place.world > 1:
            torch.distributed.broadcast(version, src=0)
        self.attach(int(version))

    # ── a step ──────────────────────────────────────────────────────────────

    def draw(self, step: int) -> None:
        """Make this process's dropout of a step follow from (seed, step, process)."""
        seeds = np.random.SeedSequence([self.seed, step, self.place.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def update(self, step: int, loss: float) -> float:
        """Take the optimiser's step and share BatchNorm's statistics; returns the learning rate.

        Raises:
            UserError: the loss, which is that of all processes, is not finite.
        """
        if not math.isfinite(loss):
            raise UserError(f"The loss became infinite or no number at step {step + 1}: lower train.learning_rate.")
        c = self.settings
        rate = learning_rate(
            step, c.schedule, c.learning_rate, total_steps=self.steps, warm_up_steps=c.warm_up_steps, power=c.power
        )
        self.strategy.step(rate, c.clip)
        self._share_statistics()
        return rate

    def precision(self) -> Any:
        """The context of forward passes."""
        wanted = self.settings.precision == "bfloat16"
        return torch.autocast(self.place.device.type, torch.bfloat16, enabled=wanted)

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.place.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.place.device)
        torch.distributed.all_reduce(total)
        return float(total)

    def _share_statistics(self) -> None:
        """BatchNorm's running statistics, averaged: every process saw other sequences."""
        if self.place.world == 1:
            return
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d):
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    torch.distributed.all_reduce(statistic)
                    statistic /= self.place.world

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """For an optimiser: weight decay on matrices alone."""
        return [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]

    # ── resume ──────────────────────────────────────────────────────────────

    def save(self, path: Path, described: Mapping[str, Any]) -> None:
        """Write a checkpoint; every process must ask."""
        moments = self.strategy.optimizer_state()
        if self.place.leads:
            groups = {_MODEL: self.model.state_dict(), _OPTIMIZER: moments}
            save_checkpoint(path, groups, {"memory_version": self.version, **described})

    def restore(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns what was described in it.

        Raises:
            UserError: it holds a model of another shape.
        """
        groups, described = load_checkpoint(path)
        self._load(path, groups)
        self.attach(described["memory_version"])
        self.strategy = self.make_strategy()
        self.strategy.load_optimizer_state(groups.get(_OPTIMIZER, {}))
        self._load(path, groups)  # DeepSpeed has done an idle step, which moved BatchNorm's statistics
        return described

    def _load(self, path: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        try:
            self.model.load_state_dict(groups[_MODEL])
        except (RuntimeError, KeyError):
            raise UserError(
                f"{path}: holds a model of another shape. Choose another run_dir, or train.resume=false."
            ) from None
