"""The training of a TRIME language model, in one process of any number. Knows no Ray.

Batches follow from (seed, epoch), the coin of `ext` from (seed, update): a resumed run equals an undisturbed one, and
any number of workers computes the same updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pema_ray.runtime.hardware import DTYPES
from pema_ray.training.checkpoint import save_checkpoint
from pema_ray.training.history import Point
from pema_ray.trime.config import TrimeConfig, TrimeTrainConfig
from pema_ray.trime.model.memory_lm import TrainableLM
from pema_ray.trime.objective.objective import MemoryMode, TrimeObjective
from pema_ray.trime.text.batches import groups_of_epoch, share_of
from pema_ray.trime.text.segments import PADDING, SegmentBatch, Segments
from pema_ray.trime.training.token_trainer import TokenTrainer


@dataclass
class UpdateSchedule:
    """Which groups form an update: the epochs' groups, one after another. The same in every process."""

    config: TrimeConfig
    segments: int
    walk_S: np.ndarray | None = None
    _epoch: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def groups_per_epoch(self) -> int:
        return -(-self.segments // self.config.batches.group)

    def group(self, number: int) -> np.ndarray:
        """Segments of the group with this number, counted over all epochs."""
        epoch, within = divmod(number, self.groups_per_epoch)
        if self._epoch[0] != epoch:
            b = self.config.batches
            groups = groups_of_epoch(self.segments, b.group, b.order, self.config.seed, epoch, self.walk_S)
            self._epoch = (epoch, groups)
        return self._epoch[1][within]

    def numbers(self, update: int) -> range:
        """Groups of an update."""
        each = self.config.batches.groups_per_update
        return range(update * each, (update + 1) * each)

    def mode(self, number: int, update: int) -> MemoryMode:
        """The memory of a group: none during the warm-up by cross-entropy, then as configured."""
        c = self.config.train
        if c.memory == "none" or number < c.ce_epochs * self.groups_per_epoch:
            return MemoryMode("none")
        coin = np.random.default_rng([self.config.seed, update]).random()
        hidden = c.memory == "ext" and coin < c.hide_local
        return MemoryMode(c.memory, hidden, c.across_documents, self.config.batches.across_workers)


@dataclass
class TrimeTrainer(TokenTrainer[TrimeTrainConfig, TrimeConfig, Segments]):
    """Trains a TRIME language model."""

    model: TrainableLM

    def __post_init__(self) -> None:
        super().__post_init__()
        self._schedule = UpdateSchedule(self.config, len(self.train), self.walk_S)

    @cached_property
    def objective(self) -> TrimeObjective:
        return TrimeObjective(self.model, DTYPES[self.settings.dtype])

    @property
    def steps(self) -> int:
        return self.settings.updates

    @property
    def batch_size(self) -> int:
        return self.config.batches.groups_per_update * self.config.batches.group

    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        """torch's own; weight decay on every parameter, as fairseq has it."""
        c, parameters = self.settings, [parameter for _, parameter in named]
        match c.optimizer:
            case "nag":
                nesterov = c.momentum > 0
                return SGD(parameters, c.learning_rate, c.momentum, weight_decay=c.weight_decay, nesterov=nesterov)
            case "adam":
                return Adam(parameters, c.learning_rate, c.betas, weight_decay=c.weight_decay)
            case "adamw":
                return AdamW(parameters, c.learning_rate, c.betas, weight_decay=c.weight_decay)

    def idle_inputs(self) -> tuple[Any, ...]:
        return self._inputs(self.train.none(), self._schedule.mode(0, 0), 1.0)

    # ── a step ──────────────────────────────────────────────────────────────

    @property
    def parts_per_step(self) -> int:
        groups = self.config.batches.groups_per_update
        return groups if self.config.batches.across_workers else -(-groups // self.place.world)

    def parts(self, step: int) -> Iterator[tuple[SegmentBatch, MemoryMode]]:
        """This process's share of a step; every process has equally many parts, some of padding."""
        rank, world = self.place.rank, self.place.world
        numbers = list(self._schedule.numbers(step))
        if self.config.batches.across_workers:
            for number in numbers:
                segments, first = share_of(self._schedule.group(number), rank, world)
                batch = self.train.batch(segments, first) if len(segments) else self.train.none()
                yield batch, self._schedule.mode(number, step)
            return
        for at in range(rank, self.parts_per_step * world, world):
            number = numbers[min(at, len(numbers) - 1)]
            batch = self.train.batch(self._schedule.group(number)) if at < len(numbers) else self.train.none()
            yield batch, self._schedule.mode(number, step)

    def tokens_of(self, step: int) -> int:
        last, padding = len(self.train) - 1, len(self.train) * self.train.length - len(self.train.stream)
        groups = map(self._schedule.group, self._schedule.numbers(step))
        return sum(len(group) * self.train.length - padding * (last in group) for group in groups)

    def inputs(self, step: int) -> list[tuple[Any, ...]]:
        divisor = self.tokens_of(step) / self.place.world
        return [self._inputs(batch, mode, divisor) for batch, mode in self.parts(step)]

    def _inputs(self, batch: SegmentBatch, mode: MemoryMode, divisor: float) -> tuple[Any, ...]:
        return (*(torch.from_numpy(array).to(self.place.device) for array in batch), mode, divisor)

    # ── validation ──────────────────────────────────────────────────────────

    def validation(self) -> Point:
        """On consecutive dev segments; no position ever sees a later one.

        A model trained with `local` memory is judged with it, `long` and `ext` with all earlier positions of the group
        (`ext` has no datastore yet), also during the warm-up.
        """
        c, b = self.settings, self.config.batches
        memory = "long" if c.memory == "ext" else c.memory
        mode = MemoryMode(memory, across_documents=c.across_documents)
        totals = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        groups = [range(first, min(first + b.group, len(self.dev))) for first in range(0, len(self.dev), b.group)]
        for group in groups[: c.validation_groups][self.place.rank :: self.place.world]:
            batch = self.dev.batch(list(group))
            sums = self.objective(*self._inputs(batch, mode, 1.0))[1]
            totals += torch.cat([sums, sums.new_tensor([(batch.label_BL != PADDING).sum()])])
        loss, vocabulary_loss, tokens = self.place.all_reduce(totals).tolist()
        return {"loss": loss / tokens, "vocabulary_loss": vocabulary_loss / tokens}

    def after_validation(self, step: int) -> None:
        if self.settings.keep_checkpoints and self.place.leads:
            path = self.run_dir / f"checkpoints/step-{step:07d}.safetensors"
            save_checkpoint(path, {"model": self.model.state_dict()})
