"""The one training loop, as each of the training processes runs it. Knows no Ray and no model.

A method brings a `Trainer`: what a step learns from, how the model is validated, and what a checkpoint holds beside it.
Batches follow from (seed, epoch) and dropout from (seed, step, process), and a checkpoint holds all else: a run that
resumes goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pema_ray.errors import UserError
from pema_ray.runtime.hardware import peak_memory
from pema_ray.training.checkpoint import CHECKPOINT, Groups, PointLog, load_checkpoint, save_checkpoint
from pema_ray.training.config import TrainingConfig
from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.strategies import Place, Strategy, make_strategy

logger = logging.getLogger(__name__)
BEST, POINTS = "best.safetensors", "points.jsonl"
RESUMED_FROM = (POINTS, BEST, CHECKPOINT)

_KINDS = ("train", "validation")
_MODEL, _OPTIMIZER = "model", "optimizer"  # groups of a checkpoint
S = TypeVar("S", bound=TrainingConfig)
H = TypeVar("H", bound=TrainerHistory)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one process computes of a step."""

    parts: Sequence[tuple[Any, ...]]
    """The objective's arguments, part by part; every process has equally many."""
    count: float
    """What the step's losses are the mean over: tokens or labels of all processes, or the processes themselves."""


class Trainer(ABC, Generic[S, H]):
    """Trains `model` step by step, from the checkpoint in `run_dir` if there is one, whatever `settings.resume` says:
    who wants to start over removes it (`run_workers` does).

    Attributes:
        run_dir: holds what `resumed_from` names; every process sees the same folder.
        model: what checkpoints hold.
        objective: `forward(*part)` returns the loss of a part first; what it returns, added up over parts and
            processes, is what `point` is given. It holds the model, and lies on the place's device.
        on_point: called by the leading process with each training or validation point.
        on_saved: called by every process with the last validation's figures, once their checkpoint is saved.
    """

    settings: S
    run_dir: Path
    place: Place
    seed: int
    model: Any
    objective: Any
    history: H
    on_point: OnPoint
    on_saved: OnSaved
    strategy: Strategy

    # ── what a trainer says ─────────────────────────────────────────────────

    @property
    @abstractmethod
    def steps(self) -> int:
        """Of the optimiser, in the whole training."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Of a step, over all processes."""

    @property
    @abstractmethod
    def validate_every(self) -> int:
        """Steps between two validations; there is one after the last step too."""

    @abstractmethod
    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        """Of the parameters that require a gradient."""

    @abstractmethod
    def idle_inputs(self) -> tuple[Any, ...]:
        """Some arguments of the objective, for a step that moves nothing: DeepSpeed needs one before it can resume."""

    @abstractmethod
    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        """Inputs of the steps from `first` on."""

    @abstractmethod
    def learning_rate(self, step: int) -> float: ...

    @abstractmethod
    def point(self, sums: Tensor, count: float) -> Point:
        """The figures recorded for a step, `loss` among them.

        Args:
            sums: what the objective returned, all its numbers in a row, added up over parts and processes.
            count: of the step's inputs.
        """

    @abstractmethod
    def validation(self) -> Point | None:
        """How the model does on held-out data, the same in every process; none: there is no such data."""

    # ── what a trainer may say ──────────────────────────────────────────────

    resumed_from: tuple[str, ...] = RESUMED_FROM
    """Files and folders in `run_dir` that a resumed run needs."""
    validates_first = True
    """Whether there is a validation before the first step."""
    unused_parameters = False
    """Whether some parameters may get no gradient in some steps."""

    @property
    def patience(self) -> int | None:
        """Validations without a better one before training stops; none: never."""
        return None

    @property
    def parts_per_step(self) -> int:
        """In which every process computes its share of a step."""
        return self.settings.accumulate

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints; there is one after the last step too, also where training stops early."""
        return self.validate_every

    def prepare(self) -> None:
        """Make the model what it is before the first step."""

    def score(self, point: Point) -> float:
        """What decides which model is kept, from a validation; less is better."""
        return point["loss"]

    def keep(self) -> None:
        """Write away the model as the best so far; every process calls."""
        if self.place.leads:
            save_checkpoint(self.run_dir / BEST, {_MODEL: self.model.state_dict()})

    def best_figures(self) -> Point:
        """Of the model that is kept, as Ray Train is told."""
        return {"best_step": self.history.best_step, "best_loss": self.history.best_loss}

    def take_best(self) -> None:
        """Make the model the one that was kept, in the end."""
        self.model.load_state_dict(load_checkpoint(self.run_dir / BEST)[0][_MODEL])

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a step's passes."""
        return nullcontext()

    def after_step(self, step: int) -> None:
        """What follows the `step`-th step, before its validation."""

    def after_validation(self, step: int) -> None:
        """What follows a validation."""

    def after_save(self) -> None:
        """What follows a checkpoint, which is then in its place."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint says beside weights and history, in JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""

    # ── the loop ────────────────────────────────────────────────────────────

    def run(self) -> H:
        """Train to the end, from the checkpoint if there is one; `model` is then the best one."""
        self.model.to(self.place.device)
        step = self._restore() if (self.run_dir / CHECKPOINT).exists() else self._begin()
        with closing(self.batches(step)) as batches:
            while step < self.steps and not self.history.stopped_early:
                started = time.perf_counter()
                inputs = next(batches, None)
                if inputs is None:
                    raise UserError(f"{self.run_dir}: there are batches for {step} of {self.steps} steps only.")
                point = self.learn(step, inputs)
                self.history.seconds += time.perf_counter() - started
                self.history.train.append(point)
                self._tell("train", point)
                step += 1
                self.after_step(step)
                if step % self.validate_every == 0 or step == self.steps:
                    self._validate(step)
                if step % self.checkpoint_every == 0 or step == self.steps or self.history.stopped_early:
                    self._save(step)
        self._measure_memory()
        if self.place.world > 1:
            torch.distributed.barrier()  # the leading process may still be writing its best
        self.take_best()
        return self.history

    def learn(self, step: int, inputs: StepInputs) -> Point:
        """Take one step of the optimiser.

        Returns:
            Its losses, over all processes.

        Raises:
            UserError: a loss that is not finite; nothing has moved.
        """
        self.objective.train()
        torch.manual_seed(mix_seed(self.seed, step, self.place.rank))
        sums: Any = 0.0
        for number, part in enumerate(inputs.parts):
            with self.precision():
                outputs = self.strategy.learn(part, last=number == len(inputs.parts) - 1)
            sums = sums + torch.cat([output.double().reshape(-1) for output in outputs])
        rate = self.learning_rate(step)
        point = {"step": step + 1, **self.point(self.sum(sums), inputs.count), "learning_rate": rate}
        if not math.isfinite(point["loss"]):
            raise UserError(f"The loss became infinite or no number at step {step + 1}: lower train.learning_rate.")
        self.strategy.step(rate, self.settings.clip)
        return point

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        self.objective.eval()
        measured = self.validation()
        if measured is None:
            return
        point, history = {"step": step, **measured}, self.history
        history.validation.append(point)
        if (score := self.score(point)) < history.best_loss:
            history.best_loss, history.best_step, history.stale = score, step, 0
            self.keep()
        else:
            history.stale += 1
            history.stopped_early = self.patience is not None and history.stale >= self.patience
        self.after_validation(step)
        self._tell("validation", point)

    def _tell(self, kind: str, point: Point) -> None:
        if self.place.leads:
            self.on_point(kind, point)

    def _measure_memory(self) -> None:
        self.history.peak_bytes = max(self.history.peak_bytes, peak_memory(self.place.device))

    # ── processes ───────────────────────────────────────────────────────────

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place; the same in each of them."""
        if self.place.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def agree(self, values: Tensor) -> Tensor:
        """The leading process's, for all: a rounding difference must not stop some workers and not others."""
        if self.place.world > 1:
            torch.distributed.broadcast(values, src=0)
        return values

    # ── beginning, checkpoints ──────────────────────────────────────────────

    def make_strategy(self) -> Strategy:
        """Around the objective, once the model's weights are those to begin with: DeepSpeed keeps copies of its own."""
        c = self.settings
        return make_strategy(
            c.strategy,
            self.place,
            self.objective,
            self.make_optimizer,
            batch_size=self.batch_size,
            accumulate=self.parts_per_step,
            clip=c.clip,
            zero_stage=c.zero_stage,
            idle_inputs=self.idle_inputs,
            unused_parameters=self.unused_parameters,
        )

    def _begin(self) -> int:
        self._logged: Counter[str] = Counter()
        self.prepare()
        if self.steps:
            self.strategy = self.make_strategy()
        if self.validates_first or not self.steps:
            self._validate(0)
        return 0

    def _save(self, step: int) -> None:
        self._measure_memory()
        moments = self.strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            for kind in _KINDS:
                points = getattr(self.history, kind)
                self._log.append({"kind": kind, **point} for point in points[self._logged[kind] :])
                self._logged[kind] = len(points)
            without_points = replace(self.history, train=[], validation=[]).to_dict()
            described = {"step": step, "history": without_points, "points_bytes": self._log.size, "state": self.state()}
            save_checkpoint(
                self.run_dir / CHECKPOINT, {_MODEL: self.model.state_dict(), _OPTIMIZER: moments}, described
            )
        validated = self.history.validation[-1] | self.best_figures() if self.history.validation else {}
        self.on_saved({**validated, **self.state(), "step": step})
        self.after_save()

    def _restore(self) -> int:
        path = self.run_dir / CHECKPOINT
        groups, described = load_checkpoint(path)
        if _MODEL not in groups or not described.keys() >= {"step", "history", "points_bytes", "state"}:
            raise UserError(f"{path}: is of another version of this project. Start over with train.resume=false.")
        self._load(path, groups)
        history = {**described["history"], **{kind: [] for kind in _KINDS}}
        for point in self._log.read(described["points_bytes"]):
            history[point.pop("kind")].append(point)
        self.history = type(self.history).from_dict(history)
        self._logged = Counter({kind: len(history[kind]) for kind in _KINDS})
        self.load_state(described["state"])
        self.strategy = self.make_strategy()
        self.strategy.load_optimizer_state(groups.get(_OPTIMIZER, {}))
        self._load(path, groups)  # DeepSpeed has done an idle step, which moves BatchNorm's statistics
        logger.info("training resumes at step %d", described["step"])
        return described["step"]

    def _load(self, path: Path, groups: Groups) -> None:
        try:
            self.model.load_state_dict(groups[_MODEL])
        except RuntimeError:
            raise UserError(
                f"{path}: holds a model of another shape. Start over with train.resume=false, or take another run_dir."
            ) from None

    @cached_property
    def _log(self) -> PointLog:
        return PointLog(self.run_dir / POINTS)


def mix_seed(seed: int, *numbers: int) -> int:
    """A seed that follows from all of these."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
