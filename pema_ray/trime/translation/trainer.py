"""The training of a translation model, in one process of any number. Knows no Ray.

Groups follow from (seed, epoch): a resumed run equals an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW

from pema_ray.training.history import Point
from pema_ray.trime.objective.memories import PADDING
from pema_ray.trime.text.batches import share_of
from pema_ray.trime.training.token_trainer import TokenTrainer
from pema_ray.trime.translation.config import MtConfig, MtTrainConfig
from pema_ray.trime.translation.data import Parallel, padded
from pema_ray.trime.translation.groups import cut, groups_of
from pema_ray.trime.translation.model import Translator
from pema_ray.trime.translation.objective import MtMemoryMode, MtObjective


@dataclass
class MtTrainer(TokenTrainer[MtTrainConfig, MtConfig, Parallel]):
    """Trains a translator.

    Validation is the vocabulary's loss alone on dev: a translator never has other dev sentences' targets.

    Args:
        eos: ends sources and targets.
    """

    model: Translator
    eos: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._groups = groups_of(self.train, self.config.batches, self.config.seed, self.walk_S)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @cached_property
    def objective(self) -> MtObjective:
        return MtObjective(self.model)

    @property
    def steps(self) -> int:
        each = self.config.batches.groups_per_update
        return max(1, math.ceil(self.settings.epochs * len(self._groups) / each))

    @property
    def batch_size(self) -> int:
        return self.config.batches.groups_per_update

    @property
    def parts_per_step(self) -> int:
        return self.config.batches.groups_per_update

    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> AdamW:
        c = self.settings
        return AdamW([parameter for _, parameter in named], c.learning_rate, c.betas, weight_decay=c.weight_decay)

    def idle_inputs(self) -> tuple[Any, ...]:
        return self._inputs(self.train, np.empty(0, np.int64), MtMemoryMode(False), 1.0)

    # ── a step ──────────────────────────────────────────────────────────────

    def _numbers(self, step: int) -> range:
        """Groups of a step."""
        each = self.config.batches.groups_per_update
        return range(step * each, (step + 1) * each)

    def group(self, number: int) -> np.ndarray:
        """Sentences of the group with this number, counted over all epochs."""
        epoch, within = divmod(number, len(self._groups))
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.config.seed, epoch])
            self._order = (epoch, generator.permutation(len(self._groups)))
        return self._groups[self._order[1][within]]

    def mode(self, number: int) -> MtMemoryMode:
        """No memory during the warm-up by cross-entropy, then as configured."""
        c = self.settings
        on = c.memory == "trime" and number >= c.ce_epochs * len(self._groups)
        return MtMemoryMode(on, c.temperature, c.top_k)

    def parts(self, step: int) -> Iterator[tuple[np.ndarray, MtMemoryMode]]:
        """This process's sentences of each group of a step."""
        for number in self._numbers(step):
            sentences, _ = share_of(self.group(number), self.place.rank, self.place.world)
            yield sentences, self.mode(number)

    def tokens_of(self, step: int) -> int:
        """Target tokens of a step, over all processes, `<eos>` among them."""
        groups = map(self.group, self._numbers(step))
        return sum(len(self.train.target[sentence]) + 1 for group in groups for sentence in group)

    def _inputs(self, pairs: Parallel, numbers: np.ndarray, mode: MtMemoryMode, divisor: float) -> tuple[Any, ...]:
        """Tensors of some sentences; without any, one of padding, since every process takes part in every exchange."""
        m = self.model
        sources = [pairs.source[n] + [self.eos] for n in numbers] or [[self.eos]]
        inputs = [[m.start, *pairs.target[n]] for n in numbers] or [[m.start]]
        labels = [pairs.target[n] + [self.eos] for n in numbers] or [[PADDING]]
        arrays = (padded(sources, m.pad), padded(inputs, m.pad), padded(labels, PADDING))
        tensors = [torch.from_numpy(array).to(self.place.device) for array in arrays]
        sentence_B = torch.as_tensor(numbers if len(numbers) else [-1], device=self.place.device)
        return (*tensors, sentence_B, mode, divisor)

    def inputs(self, step: int) -> list[tuple[Any, ...]]:
        divisor = self.tokens_of(step) / self.place.world
        return [self._inputs(self.train, numbers, mode, divisor) for numbers, mode in self.parts(step)]

    def validation(self) -> Point:
        lengths = [len(target) + 1 for target in self.dev.target]
        limit = max(self.config.batches.max_tokens, max(lengths))
        groups = cut(np.argsort(lengths, kind="stable"), lengths, limit)
        sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)
        for group in groups[self.place.rank :: self.place.world]:
            sums += self.objective(*self._inputs(self.dev, group, MtMemoryMode(False), 1.0))[1]
        loss = float(self.place.all_reduce(sums)[1]) / sum(lengths)
        return {"loss": loss, "vocabulary_loss": loss}
