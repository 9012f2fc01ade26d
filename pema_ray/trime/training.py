"""The training loop of a TRIME language model, in one process of any number. Knows no Ray.

Batches follow from (seed, epoch), the coin of `ext` from (seed, update), dropout from (seed, update, part, process): a
run that resumes goes on exactly as if it had never stopped, and any number of workers computes the same updates.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pema_ray.errors import UserError
from pema_ray.hardware import DTYPES, peak_memory
from pema_ray.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pema_ray.training.schedules import learning_rate
from pema_ray.training.strategies import Place, Strategy, make_strategy

if TYPE_CHECKING:
    from pema_ray.training.ray_loop import Tell
from pema_ray.trime.batches import groups_of_epoch, share_of
from pema_ray.trime.config import TrimeConfig, TrimeTrainConfig
from pema_ray.trime.model import TrainableLM
from pema_ray.trime.objective import TrimeObjective, Ways
from pema_ray.trime.segments import PADDING, SegmentBatch, Segments

logger = logging.getLogger(__name__)
BEST = "best.safetensors"


@dataclass(frozen=True, slots=True)
class Point:
    """Losses at an update, nats per token: of the objective, and of the vocabulary alone."""

    step: int
    loss: float
    vocabulary_loss: float
    seconds: float
    """Of training and validation so far."""


@dataclass
class History:
    """What a training run went through; JSON beside the model. `train` has means between validations."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
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
    def from_dict(cls, told: dict[str, Any]) -> History:
        points = {name: [Point(**point) for point in told[name]] for name in ("train", "validation")}
        return cls(**{**told, **points})


class Part(NamedTuple):
    """What a process computes of an update at a time."""

    batch: SegmentBatch
    ways: Ways


@dataclass
class Schedule:
    """Which groups form an update: the epochs' groups, one after another. Pure numbers, the same in every process."""

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
            made = groups_of_epoch(self.segments, b.group, b.order, self.config.seed, epoch, self.walk_S)
            self._epoch = (epoch, made)
        return self._epoch[1][within]

    def numbers(self, update: int) -> range:
        """Groups of an update."""
        each = self.config.batches.groups_per_update
        return range(update * each, (update + 1) * each)

    def ways(self, number: int, update: int) -> Ways:
        """What the memory of a group is: none during the warm-up by cross-entropy, then as configured."""
        c = self.config.train
        if c.memory == "none" or number < c.ce_epochs * self.groups_per_epoch:
            return Ways("none")
        coin = np.random.default_rng([self.config.seed, update]).random()
        hidden = c.memory == "ext" and coin < c.hide_local
        return Ways(c.memory, hidden, c.across_documents, self.config.batches.across_workers)


@dataclass
class Trainer:
    """Trains one model.

    Args:
        run_dir: holds the checkpoint (resume) and the best model; every process sees the same folder.
        tell: called with each training or validation point.
        walk_S: BM25's order of the training segments.
    """

    config: TrimeConfig
    model: TrainableLM
    train: Segments
    dev: Segments
    run_dir: Path
    place: Place = field(default_factory=Place)
    tell: Tell = lambda kind, point: None
    walk_S: np.ndarray | None = None

    def run(self) -> History:
        """Train to the end; `model` is then the best one by validation."""
        c, device = self.config.train, self.place.device
        self.model.to(device)
        self._schedule = Schedule(self.config, len(self.train), self.walk_S)
        objective = TrimeObjective(self.model, DTYPES[c.dtype])
        step, history, moments = self._restore()
        strategy = make_strategy(
            c.strategy,
            self.place,
            objective,
            lambda named: make_optimizer(c, [parameter for _, parameter in named]),
            batch_size=self.config.batches.groups_per_update * self.config.batches.group,
            accumulate=self._parts_per_update,
            clip=c.clip,
            zero_stage=c.zero_stage,
            idle_inputs=lambda: self._inputs(Part(self.train.none(), self._schedule.ways(0, 0)), 1.0),
        )
        strategy.load_optimizer_state(moments)
        self._optimise(objective, strategy, history, step)
        history.peak_bytes = peak_memory(device)
        self._meet()  # the leading process may still be writing its best
        best, _ = load_checkpoint(self.run_dir / BEST)
        self.model.load_state_dict(best["model"])
        return history

    # ── an update ───────────────────────────────────────────────────────────

    @property
    def _parts_per_update(self) -> int:
        groups = self.config.batches.groups_per_update
        return groups if self.config.batches.across_workers else -(-groups // self.place.world)

    def parts(self, update: int) -> Iterator[Part]:
        """This process's share of an update; every process has equally many parts, padding if need be."""
        rank, world = self.place.rank, self.place.world
        numbers = list(self._schedule.numbers(update))
        if self.config.batches.across_workers:
            for number in numbers:
                mine, first = share_of(self._schedule.group(number), rank, world)
                batch = self.train.batch(mine, first) if len(mine) else self.train.none()
                yield Part(batch, self._schedule.ways(number, update))
            return
        for turn in range(self._parts_per_update):
            at = turn * world + rank
            if at < len(numbers):
                group = self._schedule.group(numbers[at])
                yield Part(self.train.batch(group), self._schedule.ways(numbers[at], update))
            else:
                yield Part(self.train.none(), self._schedule.ways(numbers[-1], update))

    def tokens_of(self, update: int) -> int:
        """Tokens of an update, over all processes."""
        found = 0
        for number in self._schedule.numbers(update):
            group = self._schedule.group(number)
            whole = len(group) * self.train.length
            found += whole - (len(self.train) * self.train.length - len(self.train.stream)) * (
                len(self.train) - 1 in group
            )
        return found

    def _optimise(self, objective: TrimeObjective, strategy: Strategy, history: History, step: int) -> None:
        c = self.config.train
        if step == 0:
            self._validate(objective, history, 0)
        since = np.zeros(3)  # losses' sums and tokens since the last validation
        while step < c.updates and not history.stopped_early:
            started = time.perf_counter()
            objective.train()
            tokens = self.tokens_of(step)
            sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)
            for number, part in enumerate(self.parts(step)):
                torch.manual_seed(_mix(self.config.seed, step, number, self.place.rank))
                inputs = self._inputs(part, tokens / self.place.world)
                sums += strategy.learn(inputs, last=number == self._parts_per_update - 1)[1]
            strategy.step(self.learning_rate(step), c.clip)
            step += 1
            loss, vocabulary_loss = (self._sum(sums) / tokens).tolist()
            if not math.isfinite(loss):
                raise UserError(f"The loss became infinite or no number at update {step}: lower train.learning_rate.")
            since += np.array([loss * tokens, vocabulary_loss * tokens, tokens])
            history.tokens += tokens
            history.seconds += time.perf_counter() - started
            self._tell("train", Point(step, loss, vocabulary_loss, history.seconds))
            if step % c.validate_every == 0 or step == c.updates:
                means = (since[:2] / since[2]).tolist()
                history.train.append(Point(step, means[0], means[1], history.seconds))
                since[:] = 0
                self._validate(objective, history, step)
                self._save(strategy, history, step)

    def learning_rate(self, step: int) -> float:
        c = self.config.train
        return learning_rate(
            step,
            c.schedule,
            c.learning_rate,
            total_steps=c.updates,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate,
        )

    def _inputs(self, part: Part, divisor: float) -> tuple[Any, ...]:
        tensors = (torch.from_numpy(array).to(self.place.device) for array in part.batch)
        return (*tensors, part.ways, divisor)

    # ── validation ──────────────────────────────────────────────────────────

    @torch.no_grad()
    def _validate(self, objective: TrimeObjective, history: History, step: int) -> None:
        """On consecutive dev segments; no position ever sees a later one.

        A model trained with `local` memory is judged with it, `long` and `ext` with all earlier positions of the
        group (`ext` has no datastore yet), whatever the warm-up is at.
        """
        started = time.perf_counter()
        c, b = self.config.train, self.config.batches
        memory = "long" if c.memory == "ext" else c.memory
        ways = Ways(memory, across_documents=c.across_documents)
        objective.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        groups = [range(first, min(first + b.group, len(self.dev))) for first in range(0, len(self.dev), b.group)]
        for group in groups[: c.validation_groups][self.place.rank :: self.place.world]:
            batch = self.dev.batch(list(group))
            sums = objective(*self._inputs(Part(batch, ways), 1.0))[1]
            totals += torch.cat([sums, sums.new_tensor([(batch.label_BL != PADDING).sum()])])
        loss, vocabulary_loss, tokens = self._sum(totals).tolist()
        history.seconds += time.perf_counter() - started
        point = Point(step, loss / tokens, vocabulary_loss / tokens, history.seconds)
        history.validation.append(point)
        if point.loss < history.best_loss:
            history.best_loss, history.best_step, history.stale = point.loss, step, 0
            self._keep(BEST)
        else:
            history.stale += 1
            history.stopped_early = c.patience is not None and history.stale >= c.patience
        if c.keep_checkpoints:
            self._keep(f"checkpoints/step-{step:07d}.safetensors")
        self._tell("validation", point)

    def _keep(self, name: str) -> None:
        if self.place.leads:
            save_checkpoint(self.run_dir / name, {"model": self.model.state_dict()})

    # ── processes ───────────────────────────────────────────────────────────

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes, the same in each of them."""
        if self.place.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def _meet(self) -> None:
        if self.place.world > 1:
            torch.distributed.barrier()

    def _tell(self, kind: str, point: Point) -> None:
        if self.place.leads:
            self.tell(kind, asdict(point))

    # ── resume ──────────────────────────────────────────────────────────────

    def _save(self, strategy: Strategy, history: History, step: int) -> None:
        moments = strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            groups = {"model": self.model.state_dict(), "optimizer": moments}
            save_checkpoint(self.run_dir / CHECKPOINT, groups, {"step": step, "history": history.to_dict()})

    def _restore(self) -> tuple[int, History, dict[str, Tensor]]:
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            return 0, History(), {}
        groups, told = load_checkpoint(path)
        try:
            self.model.load_state_dict(groups["model"])
        except RuntimeError:
            raise UserError(f"{path}: holds a model of another shape. Delete it to start over.") from None
        logger.info("training resumes at update %d", told["step"])
        return told["step"], History.from_dict(told["history"]), groups.get("optimizer", {})


def make_optimizer(config: TrimeTrainConfig, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """torch's own; weight decay on every parameter, as fairseq has it."""
    c = config
    match c.optimizer:
        case "nag":
            return SGD(parameters, c.learning_rate, c.momentum, weight_decay=c.weight_decay, nesterov=c.momentum > 0)
        case "adam":
            return Adam(parameters, c.learning_rate, c.betas, weight_decay=c.weight_decay)
        case "adamw":
            return AdamW(parameters, c.learning_rate, c.betas, weight_decay=c.weight_decay)


def _mix(seed: int, *numbers: int) -> int:
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
