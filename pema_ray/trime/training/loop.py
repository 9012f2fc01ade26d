"""What the trainings of language models and of translators have in common: updates, their history, resuming. No Ray.

Dropout follows from (seed, update, part, process), and a checkpoint holds all else: a run that resumes goes on exactly
as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.runtime.hardware import peak_memory
from pema_ray.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pema_ray.training.schedules import learning_rate
from pema_ray.training.strategies import Place, Strategy

if TYPE_CHECKING:
    from pema_ray.training.ray_checkpoint import Saved
    from pema_ray.training.ray_loop import Tell
    from pema_ray.trime.config import TrimeTrainConfig
    from pema_ray.trime.translation.config import MtTrainConfig

logger = logging.getLogger(__name__)
BEST = "best.safetensors"
RESUMED_FROM = (BEST, CHECKPOINT)
"""Files in a run's folder that a resumed run needs."""
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class UpdateLosses:
    """Losses at an update, nats per token: of the objective, and of the vocabulary alone."""

    step: int
    loss: float
    vocabulary_loss: float
    seconds: float
    """Of training and validation so far."""


@dataclass
class UpdateHistory:
    """What a training run went through; JSON beside the model. `train` has means between validations."""

    train: list[UpdateLosses] = field(default_factory=list)
    validation: list[UpdateLosses] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    stale: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    """Most memory that the leading process has held (its GPU's, where it has one)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> UpdateHistory:
        points = {name: [UpdateLosses(**point) for point in told[name]] for name in ("train", "validation")}
        return cls(**{**told, **points})


class UpdateLoop(ABC, Generic[M]):
    """Trains `model` update by update. A trainer says what an update is computed from, and how dev is judged.

    Attributes:
        run_dir: holds the checkpoint (resume) and the best model; every process sees the same folder.
        tell: called with each training or validation point.
        on_saved: called by every process with the last validation's figures, once their checkpoint is saved.
    """

    model: M
    run_dir: Path
    place: Place
    tell: Tell
    on_saved: Saved

    # ── what a trainer says ─────────────────────────────────────────────────

    @property
    @abstractmethod
    def settings(self) -> TrimeTrainConfig | MtTrainConfig: ...

    @property
    @abstractmethod
    def seed(self) -> int: ...

    @property
    @abstractmethod
    def updates(self) -> int:
        """Steps of the optimiser in the whole training."""

    @abstractmethod
    def make(self) -> tuple[nn.Module, Strategy]:
        """The objective, which returns the loss and (loss, vocabulary's loss) summed over tokens; its strategy."""

    @abstractmethod
    def inputs(self, update: int) -> Sequence[tuple[Any, ...]]:
        """The objective's arguments for each part of an update; every process has equally many."""

    @abstractmethod
    def tokens_of(self, update: int) -> int:
        """Tokens of an update, over all processes."""

    @abstractmethod
    def judge(self, objective: nn.Module) -> tuple[float, float]:
        """Losses per dev token: of the objective, and of the vocabulary alone; the same in every process."""

    # ── the loop ────────────────────────────────────────────────────────────

    def run(self) -> UpdateHistory:
        """Train to the end; `model` is then the best one by validation."""
        self.model.to(self.place.device)
        step, history, moments = self._restore()
        objective, strategy = self.make()
        strategy.load_optimizer_state(moments)
        self._optimise(objective, strategy, history, step)
        history.peak_bytes = peak_memory(self.place.device)
        if self.place.world > 1:
            torch.distributed.barrier()  # the leading process may still be writing its best
        best, _ = load_checkpoint(self.run_dir / BEST)
        self.model.load_state_dict(best["model"])
        return history

    def _optimise(self, objective: nn.Module, strategy: Strategy, history: UpdateHistory, step: int) -> None:
        c = self.settings
        if step == 0:
            self._validate(objective, history, 0)
        since = np.zeros(3)  # losses' sums and tokens since the last validation
        while step < self.updates and not history.stopped_early:
            started = time.perf_counter()
            objective.train()
            tokens, sums = self.tokens_of(step), self.learn(strategy, step)
            step += 1
            loss, vocabulary_loss = (self.sum(sums) / tokens).tolist()
            if not math.isfinite(loss):
                raise UserError(f"The loss became infinite or no number at update {step}: lower train.learning_rate.")
            since += np.array([loss * tokens, vocabulary_loss * tokens, tokens])
            history.tokens += tokens
            history.seconds += time.perf_counter() - started
            self._tell("train", UpdateLosses(step, loss, vocabulary_loss, history.seconds))
            if step % c.validate_every == 0 or step == self.updates:
                means = (since[:2] / since[2]).tolist()
                history.train.append(UpdateLosses(step, means[0], means[1], history.seconds))
                since[:] = 0
                self._validate(objective, history, step)
                self._save(strategy, history, step)

    def learn(self, strategy: Strategy, step: int) -> Tensor:
        """One update; this process's losses, summed over tokens: of the objective, and of the vocabulary alone."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)
        parts = self.inputs(step)
        for number, inputs in enumerate(parts):
            seeds = np.random.SeedSequence([self.seed, step, number, self.place.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            sums += strategy.learn(inputs, last=number == len(parts) - 1)[1]
        strategy.step(self.learning_rate(step), self.settings.clip)
        return sums

    def learning_rate(self, step: int) -> float:
        c = self.settings
        return learning_rate(
            step,
            c.schedule,
            c.learning_rate,
            total_steps=self.updates,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate,
        )

    @torch.no_grad()
    def _validate(self, objective: nn.Module, history: UpdateHistory, step: int) -> None:
        started = time.perf_counter()
        objective.eval()
        loss, vocabulary_loss = self.judge(objective)
        history.seconds += time.perf_counter() - started
        point = UpdateLosses(step, loss, vocabulary_loss, history.seconds)
        history.validation.append(point)
        if point.loss < history.best_loss:
            history.best_loss, history.best_step, history.stale = point.loss, step, 0
            self.keep(BEST)
        else:
            history.stale += 1
            history.stopped_early = self.settings.patience is not None and history.stale >= self.settings.patience
        if also := self.also_kept_as(step):
            self.keep(also)
        self._tell("validation", point)

    def also_kept_as(self, step: int) -> str | None:
        """A name for the model of this validation, beside the best one; none: it is not kept."""
        return None

    def keep(self, name: str) -> None:
        """Write the model as it is."""
        if self.place.leads:
            save_checkpoint(self.run_dir / name, {"model": self.model.state_dict()})

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, the same in each of them."""
        if self.place.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def _tell(self, kind: str, point: UpdateLosses) -> None:
        if self.place.leads:
            self.tell(kind, asdict(point))

    # ── resume ──────────────────────────────────────────────────────────────

    def _save(self, strategy: Strategy, history: UpdateHistory, step: int) -> None:
        moments = strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            groups = {"model": self.model.state_dict(), "optimizer": moments}
            save_checkpoint(self.run_dir / CHECKPOINT, groups, {"step": step, "history": history.to_dict()})
        best = {"best_step": history.best_step, "best_loss": history.best_loss}
        self.on_saved({**asdict(history.validation[-1]), **best})

    def _restore(self) -> tuple[int, UpdateHistory, dict[str, Tensor]]:
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            return 0, UpdateHistory(), {}
        groups, told = load_checkpoint(path)
        try:
            self.model.load_state_dict(groups["model"])
        except RuntimeError:
            raise UserError(f"{path}: holds a model of another shape. Start over with train.resume=false.") from None
        logger.info("training resumes at update %d", told["step"])
        return told["step"], UpdateHistory.from_dict(told["history"]), groups.get("optimizer", {})
