"""The training loop of an adapter, in one process of any number. Knows no Ray. N rows, H hidden.

Rows are shuffled anew every epoch by (seed, epoch) alone and dropout is drawn by (seed, step) alone, so a
run that resumes at a step goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pema_ray.config import TrainConfig
from pema_ray.data_owner.adapter import AdapterConfig, PemaAdapter
from pema_ray.data_owner.objectives import JointObjective, ReconstructionObjective
from pema_ray.data_owner.reconstruction import SecondMoment, reconstruction_error, solve
from pema_ray.errors import UserError
from pema_ray.line import LMHead

logger = logging.getLogger(__name__)
_CHUNK = 8192  # rows handled at once where no gradient is kept


class Representations(Protocol):
    """`[N, H]`, some rows at a time: an array, or a memory's encoded keys."""

    def __getitem__(self, index: np.ndarray | slice, /) -> np.ndarray: ...


class Rows(Protocol):
    """What training reads: `key [N, H]`, `target [N]` (a `memory.MemoryRows` is one)."""

    @property
    def key(self) -> Representations: ...
    @property
    def target(self) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Point:
    """Losses at a step, in nats and in mean squared error."""

    step: int
    loss: float
    reconstruction: float
    prediction: float


@dataclass
class History:
    """What a training run went through; JSON beside the adapter."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    best_step: int = 0
    best_prediction: float = math.inf
    stale: int = 0
    reconstruction_error: float | None = None
    reconstruction_seconds: float = 0.0
    seconds: float = 0.0
    rows: int = 0
    total_steps: int = 0
    stopped_early: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        points = {name: [Point(**point) for point in data[name]] for name in ("train", "validation")}
        return cls(**{**data, **points})


@dataclass(frozen=True)
class Place:
    """Where this process stands among the training processes, and how its module is wrapped for them."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda module: module

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass
class Trainer:
    """Trains one adapter on rows in memory.

    Args:
        run_dir: holds `checkpoint.safetensors` (resume) and `best.safetensors`; every process sees the same folder.
        on_point: called by the leading process with each training or validation point.
    """

    adapter_config: AdapterConfig
    config: TrainConfig
    head: LMHead
    train: Rows
    dev: Rows
    run_dir: Path
    seed: int = 0
    place: Place = field(default_factory=Place)
    on_point: Callable[[str, Point], None] = lambda kind, point: None

    def run(self) -> tuple[PemaAdapter, History]:
        """Stage 1, then stage 2 or 3; returns the best adapter by dev prediction loss, and the history."""
        device = self.place.device
        self.head.to(device)
        torch.manual_seed(self.seed)  # without stage 1, A stays as it is drawn here
        adapter = PemaAdapter(self.adapter_config).to(device)
        history = History(rows=len(self.train.target), total_steps=self.total_steps)
        step = 0
        optimizer = self._optimizer(adapter)
        if self.config.resume and self._checkpoint.exists():
            step, history = self._restore(adapter, optimizer)
        else:
            self._reconstruct(adapter, history)
        self._optimise(adapter, optimizer, history, step)
        best = PemaAdapter(self.adapter_config)
        best.load_state_dict(load_file(self._best))
        return best.eval(), history

    @property
    def total_steps(self) -> int:
        return max(1, len(self.train.target) // self.batch_size) * self.config.epochs

    @property
    def batch_size(self) -> int:
        """The global batch; a memory smaller than one is a single batch."""
        size = min(self.config.batch_size, len(self.train.target)) // self.place.world * self.place.world
        if size == 0:
            raise UserError(
                f"train.workers={self.place.world}: {len(self.train.target)} rows in batches of "
                f"{self.config.batch_size} give a worker nothing to do. Use fewer workers or a larger train.batch_size."
            )
        return size

    # ── stage 1 ─────────────────────────────────────────────────────────────

    def _reconstruct(self, adapter: PemaAdapter, history: History) -> None:
        started = time.perf_counter()
        if self.config.solver == "closed_form":
            moment = SecondMoment(self.adapter_config.hidden_size)
            for x in self._inputs(adapter, self.train):
                moment.add(x)
            A, B, _ = solve(moment, self.adapter_config.rank)
            adapter.start_from_reconstruction(A.to(self.place.device), B.to(self.place.device))
        elif self.config.solver == "adam":
            adapter.start_from_reconstruction(*self._reconstruct_by_gradient(adapter))
        history.reconstruction_seconds = time.perf_counter() - started
        if self.config.solver != "none":
            dev = self._inputs(adapter, self.dev)
            history.reconstruction_error = reconstruction_error(adapter.A, adapter.B_rct, dev)

    def _reconstruct_by_gradient(self, adapter: PemaAdapter) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        torch.manual_seed(self.seed)
        init = PemaAdapter(self.adapter_config)
        objective = ReconstructionObjective(init.A.detach(), init.B_rct.detach(), c.dropout).to(self.place.device)
        optimizer = torch.optim.Adam(objective.parameters(), lr=c.learning_rate)
        for epoch in range(c.reconstruction_epochs):
            for step, index in enumerate(self._batches(epoch, c.reconstruction_batch_size)):
                torch.manual_seed(_mix_seed(self.seed, epoch, step))
                loss = objective(adapter.enter(self._keys(self.train, index), self.head))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return objective.A.detach(), objective.B.detach()

    @torch.no_grad()
    def _inputs(self, adapter: PemaAdapter, rows: Rows) -> Iterator[torch.Tensor]:
        for start in range(0, len(rows.target), _CHUNK):
            yield adapter.enter(self._keys(rows, slice(start, start + _CHUNK)), self.head)

    # ── stages 2 and 3 ──────────────────────────────────────────────────────

    def _optimizer(self, adapter: PemaAdapter) -> torch.optim.Optimizer:
        return torch.optim.Adam([adapter.A, adapter.B_pd], lr=self.config.learning_rate)

    def learning_rate(self, step: int) -> float:
        """Constant as published, or a cosine down to `final_learning_rate`."""
        first, last = self.config.learning_rate, self.config.final_learning_rate
        if last is None:
            return first
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / max(1, self.total_steps)))

    def _optimise(self, adapter: PemaAdapter, optimizer: torch.optim.Optimizer, history: History, step: int) -> None:
        objective = JointObjective(adapter, self.head, self.config.kappa).to(self.place.device)
        wrapped = self.place.wrap(objective)
        per_epoch = max(1, len(self.train.target) // self.batch_size)
        if step == 0:
            self._validate(objective, history, 0)
        while step < self.total_steps and not history.stopped_early:
            started = time.perf_counter()
            epoch, within = divmod(step, per_epoch)
            index = self._index(epoch)[within * self.batch_size : (within + 1) * self.batch_size]
            index = np.sort(index[self.place.rank :: self.place.world])  # sorted: memory is read in order
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            torch.manual_seed(_mix_seed(self.seed, step, self.place.rank))
            wrapped.train()
            targets = torch.from_numpy(self.train.target[index].astype(np.int64)).to(self.place.device)
            loss, reconstruction, prediction = wrapped(self._keys(self.train, index), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            point = Point(step, float(loss.detach()), float(reconstruction), float(prediction))
            if not self._finite(point.loss):
                raise UserError(f"The loss became infinite or no number at step {step}: lower train.learning_rate.")
            history.train.append(point)
            if self.place.leads:
                self.on_point("train", point)
            if step % self.config.validate_every == 0 or step == self.total_steps:
                self._validate(objective, history, step)
            history.seconds += time.perf_counter() - started
            if step % self.config.validate_every == 0 or step == self.total_steps or history.stopped_early:
                self._save(adapter, optimizer, history, step)

    @torch.no_grad()
    def _validate(self, objective: JointObjective, history: History, step: int) -> None:
        objective.eval()
        rows, losses = min(len(self.dev.target), self.config.validation_rows), np.zeros(3)
        for start in range(0, rows, _CHUNK):
            chunk = slice(start, min(rows, start + _CHUNK))
            targets = torch.from_numpy(self.dev.target[chunk].astype(np.int64)).to(self.place.device)
            parts = objective(self._keys(self.dev, chunk), targets)
            losses += np.array([float(part) for part in parts]) * len(targets)
        point = Point(step, *self._agree(losses / rows))
        history.validation.append(point)
        if point.prediction < history.best_prediction:
            history.best_prediction, history.best_step, history.stale = point.prediction, step, 0
            if self.place.leads:
                self._write(self._best, {name: t.detach().cpu() for name, t in objective.adapter.state_dict().items()})
        else:
            history.stale += 1
            history.stopped_early = history.stale >= self.config.patience
        if self.place.leads:
            self.on_point("validation", point)

    def _agree(self, losses: np.ndarray) -> list[float]:
        """The leading process's figures, for all: a rounding difference must not stop some workers and not others."""
        agreed = torch.from_numpy(losses).to(self.place.device)
        if self.place.world > 1:
            torch.distributed.broadcast(agreed, src=0)
        return agreed.tolist()

    def _finite(self, loss: float) -> bool:
        """Whether every worker's loss is a number: they go on or give up together."""
        finite = torch.tensor(float(math.isfinite(loss)), device=self.place.device)
        if self.place.world > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    # ── rows ────────────────────────────────────────────────────────────────

    def _index(self, epoch: int) -> np.ndarray:
        if getattr(self, "_shuffled", (None, None))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train.target))
            self._shuffled = (epoch, order)
        return self._shuffled[1]

    def _batches(self, epoch: int, batch_size: int) -> Iterator[np.ndarray]:
        index = self._index(epoch)
        size = min(batch_size, len(index))
        for start in range(0, len(index) - size + 1, size):
            yield np.sort(index[start : start + size])

    def _keys(self, rows: Rows, index: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows.key[index])).to(self.place.device).float()

    # ── resume ──────────────────────────────────────────────────────────────

    @property
    def _checkpoint(self) -> Path:
        return self.run_dir / "checkpoint.safetensors"

    @property
    def _best(self) -> Path:
        return self.run_dir / "best.safetensors"

    def _save(self, adapter: PemaAdapter, optimizer: torch.optim.Optimizer, history: History, step: int) -> None:
        if not self.place.leads:
            return
        tensors = {f"adapter.{name}": t.detach().cpu() for name, t in adapter.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(t).cpu() for name, t in state.items()}
        described = {"step": str(step), "history": json.dumps(history.to_dict())}
        self._write(self._checkpoint, tensors, described)

    def _restore(self, adapter: PemaAdapter, optimizer: torch.optim.Optimizer) -> tuple[int, History]:
        with safe_open(self._checkpoint, framework="pt") as file:
            described = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        adapter.load_state_dict({n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        step = int(described["step"])
        logger.info("training resumes at step %d", step)
        return step, History.from_dict(json.loads(described["history"]))

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], described: dict[str, str] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, described)
        os.replace(temporary, path)


def _mix_seed(seed: int, *numbers: int) -> int:
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
