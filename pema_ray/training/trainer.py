"""The training loop, as each training process runs it. Knows no Ray and no model.

A method brings a `Trainer`: the inputs of each step, how the model is validated, and what a checkpoint holds beside it.
Batches depend on (seed, epoch) and dropout on (seed, step, process); a checkpoint holds everything else. A resumed run
therefore equals an undisturbed one.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.runtime.hardware import peak_memory
from pema_ray.training.checkpoint import BEST, CHECKPOINT, POINTS, RunCheckpoint
from pema_ray.training.config import TrainingConfig
from pema_ray.training.history import H, OnPoint, OnSaved, Point
from pema_ray.training.strategies import Place, Strategy, make_strategy

logger = logging.getLogger(__name__)
RESUMED_FROM = (POINTS, BEST, CHECKPOINT)
S = TypeVar("S", bound=TrainingConfig)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One process's share of a step."""

    parts: Sequence[tuple[Any, ...]]
    """The objective's arguments for each part; every process has equally many parts."""
    count: float
    """The step's losses are a mean over so many: tokens or labels of all processes, or the processes themselves."""


class Trainer(ABC, Generic[S, H]):
    """Trains `model` step by step, from the checkpoint in `run_dir` if there is one, whatever `settings.resume` says:
    to start over, remove it first (`run_workers` does).

    Attributes:
        run_dir: holds the files of `resumed_from`; every process sees the same folder.
        model: the module that checkpoints save.
        objective: holds the model, on the place's device. `forward(*part)` returns the loss of a part first; `point`
            receives all that it returns, summed over parts and processes.
        history: complete in the leading process; the others keep no training points.
        steps_taken: of the optimiser, by all processes together.
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
    steps_taken = 0
    on_point: OnPoint
    on_saved: OnSaved
    strategy: Strategy

    # ── what every method defines ───────────────────────────────────────────

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the optimiser in the whole training."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Batch size of a step, over all processes."""

    @property
    @abstractmethod
    def validate_every(self) -> int:
        """Steps between two validations; one more follows the last step."""

    @abstractmethod
    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimiser of the parameters that require a gradient."""

    @abstractmethod
    def idle_inputs(self) -> tuple[Any, ...]:
        """Valid arguments of the objective, for a step that changes nothing: DeepSpeed resumes only after a step."""

    @abstractmethod
    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        """Inputs of each step, from step `first`."""

    @abstractmethod
    def learning_rate(self, step: int) -> float: ...

    @abstractmethod
    def point(self, sums: Tensor, count: float) -> Point:
        """The figures recorded for a step, `loss` among them.

        Args:
            sums: the objective's outputs, flattened and summed over parts and processes.
            count: of the step's inputs.
        """

    @abstractmethod
    def validation(self) -> Point | None:
        """Figures of the model on held-out data, equal in every process; None without such data."""

    # ── what a method may override ──────────────────────────────────────────

    resumed_from: tuple[str, ...] = RESUMED_FROM
    """Files and folders in `run_dir` that a resumed run needs."""
    validates_first = True
    """Whether there is a validation before the first step."""
    unused_parameters = False
    """Whether some parameters may get no gradient in some steps."""

    @property
    def patience(self) -> int | None:
        """Validations without improvement before training stops; None: it never stops early."""
        return None

    @property
    def parts_per_step(self) -> int:
        """Parts in which every process computes its share of a step."""
        return self.settings.accumulate

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints; one more follows the last step, also after an early stop."""
        return self.validate_every

    def prepare(self) -> None:
        """Initialise the model before the first step."""

    def score(self, point: Point) -> float:
        """The criterion of a validation by which the best model is kept; lower is better."""
        return point["loss"]

    def keep(self) -> None:
        """Save the model as the best so far; every process calls this."""
        if self.place.leads:
            self._checkpoint.save_best(self.model)

    def best_figures(self) -> Point:
        """Figures of the best model, for reports to Ray Train."""
        return {"best_step": self.history.best_step, "best_loss": self.history.best_loss}

    def take_best(self) -> None:
        """Load the best model when training ends."""
        self._checkpoint.load_best(self.model)

    def precision(self) -> AbstractContextManager[Any]:
        """Context of a step's forward and backward passes."""
        return nullcontext()

    def after_step(self, step: int) -> None:
        """Called after the `step`-th step, before its validation."""

    def after_validation(self, step: int) -> None:
        """Called after a validation."""

    def after_save(self) -> None:
        """Called once a checkpoint is on disk."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, optimiser and history, in JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""

    # ── the loop ────────────────────────────────────────────────────────────

    def run(self) -> H:
        """Train to the end, from the checkpoint if there is one; `model` is then the best one."""
        self.model.to(self.place.device)
        self._checkpoint = RunCheckpoint(self.run_dir)
        if self._checkpoint.path.exists():
            self._restore()
        else:
            self._begin()
        with closing(self.batches(self.steps_taken)) as batches:
            while self.steps_taken < self.steps and not self.history.stopped_early:
                self._step(batches)
        self._measure_memory()
        self.place.barrier()  # the leading process may still be writing its best
        self.take_best()
        return self.history

    def _step(self, batches: Iterator[StepInputs]) -> None:
        """Take one step, then validate and save where these are due."""
        started = time.perf_counter()
        if (inputs := next(batches, None)) is None:
            raise UserError(f"{self.run_dir}: there are batches for {self.steps_taken} of {self.steps} steps only.")
        point = self.learn(self.steps_taken, inputs)
        self.history.seconds += time.perf_counter() - started
        if self.place.leads:
            self.history.train.append(point)
            self.on_point("train", point)
        self.steps_taken = step = self.steps_taken + 1
        self.after_step(step)
        if step % self.validate_every == 0 or step == self.steps:
            self._validate()
        if step % self.checkpoint_every == 0 or step == self.steps or self.history.stopped_early:
            self._save()

    def learn(self, step: int, inputs: StepInputs) -> Point:
        """Take one step of the optimiser; returns its figures over all processes.

        Raises:
            UserError: a loss is not finite; no parameter has changed.
        """
        self.objective.train()
        torch.manual_seed(mix_seed(self.seed, step, self.place.rank))
        sums: Any = 0.0
        for number, part in enumerate(inputs.parts):
            with self.precision():
                outputs = self.strategy.learn(part, last=number == len(inputs.parts) - 1)
            sums = sums + torch.cat([output.double().reshape(-1) for output in outputs])
        rate = self.learning_rate(step)
        point = {"step": step + 1, **self.point(self.place.all_reduce(sums), inputs.count), "learning_rate": rate}
        if not math.isfinite(point["loss"]):
            raise UserError(f"The loss became infinite or no number at step {step + 1}: lower train.learning_rate.")
        self.strategy.step(rate, self.settings.clip)
        return point

    @torch.no_grad()
    def _validate(self) -> None:
        self.objective.eval()
        if (figures := self.validation()) is None:
            return
        point = {"step": self.steps_taken, **figures}
        if self.history.add_validation(point, self.score(point), self.patience):
            self.keep()
        self.after_validation(self.steps_taken)
        if self.place.leads:
            self.on_point("validation", point)

    def _measure_memory(self) -> None:
        self.history.peak_bytes = max(self.history.peak_bytes, peak_memory(self.place.device))

    # ── start, checkpoints ──────────────────────────────────────────────────

    def make_strategy(self) -> Strategy:
        """The strategy around the objective, made once the initial weights are loaded: DeepSpeed copies them."""
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

    def _begin(self) -> None:
        self.prepare()
        if self.steps:
            self.strategy = self.make_strategy()
        if self.validates_first or not self.steps:
            self._validate()

    def _save(self) -> None:
        self._measure_memory()
        optimizer = self.strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            self._checkpoint.save(self.steps_taken, self.model, optimizer, self.history, self.state())
        validated = self.history.validation[-1] | self.best_figures() if self.history.validation else {}
        self.on_saved({**validated, **self.state(), "step": self.steps_taken})
        self.after_save()

    def _restore(self) -> None:
        saved = self._checkpoint.load(type(self.history), train_points=self.place.leads)
        saved.load_into(self.model)
        self.history, self.steps_taken = saved.history, saved.step
        self.load_state(saved.state)
        self.strategy = self.make_strategy()
        self.strategy.load_optimizer_state(saved.optimizer)
        saved.load_into(self.model)  # DeepSpeed has done an idle step, which changes BatchNorm's statistics
        logger.info("training resumes at step %d", saved.step)


def mix_seed(seed: int, *numbers: int) -> int:
    """A seed derived from all of these."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
