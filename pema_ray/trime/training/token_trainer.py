"""What the trainers of language models and of translators share: losses per token. No Ray."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.schedules import learning_rate
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import StepInputs, Trainer
from pema_ray.trime.config import TokenTrainingConfig, TrimeConfig
from pema_ray.trime.translation.config import MtConfig

S = TypeVar("S", bound=TokenTrainingConfig)
Config = TypeVar("Config", TrimeConfig, MtConfig)
Split = TypeVar("Split")


@dataclass
class TokenTrainer(Trainer[S, TrainerHistory], Generic[S, Config, Split]):
    """Trains one model by steps that count tokens. Points have `loss` and `vocabulary_loss`, nats per token: of the
    objective, and of the vocabulary alone. The objective returns the loss and both of these, summed over tokens.

    Args:
        walk_S: BM25's order of the training segments or sentences.
    """

    config: Config
    model: Any
    train: Split
    dev: Split
    run_dir: Path
    _: KW_ONLY
    place: Place = field(default_factory=Place)
    walk_S: np.ndarray | None = None
    on_point: OnPoint = lambda kind, point: None
    on_saved: OnSaved = lambda metrics: None
    history: TrainerHistory = field(default_factory=TrainerHistory)

    def __post_init__(self) -> None:
        self.settings, self.seed = self.config.train, self.config.seed  # type: ignore[assignment]

    @abstractmethod
    def inputs(self, step: int) -> Sequence[tuple[Any, ...]]:
        """The objective's arguments for each part of a step; every process has equally many."""

    @abstractmethod
    def tokens_of(self, step: int) -> int:
        """Tokens of a step, over all processes."""

    @property
    def tokens_trained(self) -> int:
        """Tokens of all steps taken so far."""
        return sum(self.tokens_of(step) for step in range(self.steps_taken))

    @property
    def validate_every(self) -> int:
        return self.settings.validate_every

    @property
    def patience(self) -> int | None:
        return self.settings.patience

    def learning_rate(self, step: int) -> float:
        c = self.settings
        return learning_rate(
            step,
            c.schedule,
            c.learning_rate,
            total_steps=self.steps,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate,
        )

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        for step in range(first, self.steps):
            yield StepInputs(self.inputs(step), self.tokens_of(step))

    def point(self, sums: Tensor, count: float) -> Point:
        _, loss, vocabulary_loss = (sums / count).tolist()
        return {"loss": loss, "vocabulary_loss": vocabulary_loss}
