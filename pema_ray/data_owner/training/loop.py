"""The training loop of an adapter, in one process of any number. Knows no Ray. N rows, H hidden.

Batches follow from (seed, epoch) alone and dropout is drawn by (seed, step, process) alone, so a run that resumes at a
step goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.adapter.predicted_lambda import fit_gate
from pema_ray.data_owner.training.batch_samplers import (
    Batch,
    BatchSampler,
    GlobalShuffle,
    Rows,
    SequenceRows,
    SequenceShuffle,
    ShardedRows,
    WindowShuffle,
    in_order,
    sequences_in_order,
)
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.loader import Part, load, load_parts
from pema_ray.data_owner.training.objectives import JointObjective, ReconstructionObjective, head_cross_entropy
from pema_ray.data_owner.training.reconstruction import SecondMoment, reconstruction_error, solve
from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.memory.codec import Keys, decode
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.hardware import peak_memory
from pema_ray.training import schedules
from pema_ray.training.checkpoint import CHECKPOINT, PointLog, load_checkpoint, save_checkpoint
from pema_ray.training.strategies import Place, Strategy, make_strategy

logger = logging.getLogger(__name__)
_KINDS = ("train", "validation")  # of points
_POINTS, _BEST = "points.jsonl", "best.safetensors"
RESUMED_FROM = (_POINTS, _BEST, CHECKPOINT)
"""Files in a run's folder that a resumed run needs."""


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Losses at a step, in nats and in mean squared error."""

    step: int
    loss: float
    reconstruction: float
    prediction: float


@dataclass
class AdapterHistory:
    """What a training run went through; JSON beside the adapter."""

    train: list[LossPoint] = field(default_factory=list)
    validation: list[LossPoint] = field(default_factory=list)
    best_step: int = 0
    best_prediction: float = math.inf
    stale: int = 0
    reconstruction_error: float | None = None
    reconstruction_seconds: float = 0.0
    """Of stage 1, without the measuring on the dev memory."""
    seconds: float = 0.0
    """Of the steps, waiting for their batches included, without validations and checkpoints."""
    rows: int = 0
    total_steps: int = 0
    stopped_early: bool = False
    lambda_nll: list[float] | None = None
    """Where λ is predicted: NLL of held-out rows at the best constant λ, and at the predicted one."""
    peak_bytes: int = 0
    """Most memory that the leading process has held, its rows included (its GPU's, where it has one)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AdapterHistory:
        points = {kind: [LossPoint(**point) for point in data[kind]] for kind in _KINDS}
        return cls(**{**data, **points})

    def without_points(self) -> dict[str, Any]:
        """All but the points of steps, which a checkpoint keeps in a file of their own."""
        return asdict(replace(self, train=[], validation=[]))


@dataclass
class AdapterTrainer:
    """Trains one adapter.

    Args:
        train: rows at hand (whole sequences for an adapter that looks back, and so in `dev`), shards to be read (for
            `config.shuffle: window`), or a feed made elsewhere.
        run_dir: holds `checkpoint.safetensors` and `points.jsonl` (resume), and `best.safetensors`; every process sees
            the same folder.
        on_point: called by the leading process with each training or validation point.
        on_saved: called by every process with the last validation's figures, once their checkpoint is saved.
    """

    adapter_config: AdapterConfig
    config: TrainConfig
    head: LMHead
    train: Rows | ShardedRows | BatchSampler
    dev: Rows
    run_dir: Path
    seed: int = 0
    place: Place = field(default_factory=Place)
    on_point: Callable[[str, LossPoint], None] = lambda kind, point: None
    on_saved: Callable[[Mapping[str, Any]], None] = lambda metrics: None
    _logged: Counter[str] = field(default_factory=Counter)  # points of each kind that are in the file of points

    def run(self) -> tuple[PemaAdapter, AdapterHistory]:
        """Stage 1, then stage 2 or 3; returns the best adapter by dev prediction loss, and the history."""
        device = self.place.device
        self.head.to(device)
        torch.manual_seed(self.seed)  # without stage 1, A stays as it is drawn here
        adapter = PemaAdapter(self.adapter_config).to(device)
        history = AdapterHistory(rows=self.feed.rows, total_steps=self.total_steps)
        step, moments = 0, {}
        if self.config.resume and self._checkpoint.exists():
            step, history, moments = self._restore(adapter)
        else:
            self._reconstruct(adapter, history)
        objective = JointObjective(adapter, self.head, self.config.kappa).to(device)
        strategy = self._strategy(objective)
        strategy.load_optimizer_state(moments)
        self._optimise(objective, strategy, history, step)
        history.peak_bytes = max(history.peak_bytes, peak_memory(device))
        self._meet()  # the leading process may still be writing its best
        best = PemaAdapter(self.adapter_config)
        best.load_state_dict(load_file(self._best))
        if self.config.predict_lambda and self.place.leads:
            history.lambda_nll = list(self._fit_gate(best.to(device)))
        return best.eval().cpu(), history

    @cached_property
    def feed(self) -> BatchSampler:
        """This process's batches."""
        c, place = self.config, self.place
        if isinstance(self.train, BatchSampler):
            return self.train
        if self.adapter_config.looks_back:
            return SequenceShuffle(cast(SequenceRows, self.train), c.batch_size, self.seed, place.rank, place.world)
        if isinstance(self.train, Rows):
            return GlobalShuffle(self.train, c.batch_size, self.seed, place.rank, place.world)
        return WindowShuffle(self.train, c.window_shards, c.batch_size, c.epochs, self.seed, place.rank, place.world)

    @property
    def total_steps(self) -> int:
        return self.feed.steps_per_epoch * self.config.epochs

    # ── stage 1 ─────────────────────────────────────────────────────────────

    def _reconstruct(self, adapter: PemaAdapter, history: AdapterHistory) -> None:
        started = time.perf_counter()
        measuring = 0.0
        if self.config.solver == "closed_form":
            A, B = self._solve(adapter)
        elif self.config.solver == "adam":
            A, B, measuring = self._reconstruct_by_gradient(adapter)
        else:
            return
        history.reconstruction_seconds = time.perf_counter() - started - measuring
        history.reconstruction_error = self._dev_reconstruction_error(adapter, A, B)
        if self.config.fresh_maps:
            with torch.no_grad():
                adapter.B_rct.copy_(B / adapter.config.scale)
        else:
            adapter.start_from_reconstruction(A, B)

    def _dev_reconstruction_error(self, adapter: PemaAdapter, A: torch.Tensor, B: torch.Tensor) -> float:
        dev = (self._enter(adapter, batch.key.take(batch.wanted)) for batch in self._dev(None))
        return reconstruction_error(A, B, dev)

    @torch.no_grad()
    def _solve(self, adapter: PemaAdapter) -> tuple[torch.Tensor, torch.Tensor]:
        """Every process sums up its own rows; the leading one solves, so that all start from the same bits."""
        moment = SecondMoment(self.adapter_config.hidden_size, self.place.device)
        for rows in self.feed.once():
            weight = None if rows.weight is None else torch.from_numpy(rows.weight).to(self.place.device)
            moment.add(self._enter(adapter, rows.key.take(slice(None))), weight)
        if self.place.world > 1:
            rows = torch.tensor(moment.rows, device=self.place.device)
            torch.distributed.all_reduce(moment.M)
            torch.distributed.all_reduce(rows)
            moment.rows = int(rows)
        if self.place.leads:
            A, B, _ = solve(moment, self.adapter_config.rank)
        else:
            A, B = torch.empty_like(adapter.A, device="cpu"), torch.empty_like(adapter.B_rct, device="cpu")
        A, B = A.to(self.place.device), B.to(self.place.device)
        if self.place.world > 1:
            torch.distributed.broadcast(A, src=0)
            torch.distributed.broadcast(B, src=0)
        return A, B

    def _reconstruct_by_gradient(self, adapter: PemaAdapter) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The published stage 1, every process for itself over all rows of its feed.

        Returns:
            `(A, B)` with the lowest error on dev, and the seconds spent on measuring it.
        """
        c, device = self.config, self.place.device
        if not isinstance(self.train, Rows):
            raise UserError(
                "train.solver=adam needs train.shuffle=global and no train.stream; the closed form needs neither."
            )
        torch.manual_seed(self.seed)
        init = PemaAdapter(self.adapter_config)
        scale = self.adapter_config.scale
        objective = ReconstructionObjective(init.A.detach(), init.B_rct.detach(), c.dropout, scale).to(device)
        optimizer = torch.optim.Adam(objective.parameters(), lr=c.learning_rate)
        feed = GlobalShuffle(self.train, c.reconstruction_batch_size, self.seed)
        best, stale, done = (math.inf, objective.A.detach().clone(), objective.B.detach() * scale), 0, 0
        measuring = 0.0
        total = c.reconstruction_epochs * feed.steps_per_epoch
        for epoch in range(c.reconstruction_epochs):
            for step, (_, (state, _, share, _)) in enumerate(load_parts(feed.batches(epoch), device)):
                torch.manual_seed(_mix_seed(self.seed, epoch, step))
                with torch.no_grad():
                    x = adapter.enter(state, self.head)
                loss = objective(x, share)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                done += 1
                if done % c.validate_every and done < total:
                    continue
                started = time.perf_counter()
                A, B = objective.A.detach().clone(), objective.B.detach() * scale
                error = torch.tensor([self._dev_reconstruction_error(adapter, A, B)], dtype=torch.float64)
                (agreed,) = self._agree(error.to(device))
                best, stale = ((agreed, A, B), 0) if agreed < best[0] else (best, stale + 1)
                measuring += time.perf_counter() - started
                if stale >= c.patience:
                    return *best[1:], measuring
        return *best[1:], measuring

    @torch.no_grad()
    def _enter(self, adapter: PemaAdapter, keys: Keys) -> torch.Tensor:
        data, scale = (None if t is None else t.to(self.place.device) for t in keys.tensors())
        assert data is not None
        return adapter.enter(decode(data, scale, keys.dtype), self.head)

    # ── stages 2 and 3 ──────────────────────────────────────────────────────

    def learning_rate(self, step: int) -> float:
        """Constant as published, or a cosine down to `final_learning_rate`; a straight line up to it at first."""
        c = self.config
        return schedules.learning_rate(
            step,
            "constant" if c.final_learning_rate is None else "cosine",
            c.learning_rate,
            total_steps=self.total_steps,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate or 0.0,
        )

    def _strategy(self, objective: JointObjective) -> Strategy:
        c = self.config
        return make_strategy(
            c.strategy,
            self.place,
            objective,
            lambda named: torch.optim.Adam([parameter for _, parameter in named], lr=c.learning_rate),
            batch_size=c.batch_size,
            accumulate=c.accumulate,
            clip=c.clip,
            zero_stage=c.zero_stage,
            idle_inputs=self._nothing,
        )

    def _nothing(self) -> Part:
        """A row that no loss counts."""
        nothing = torch.zeros(1, self.adapter_config.hidden_size, device=self.place.device)
        token = nothing[:, 0].long()
        return nothing, token, nothing[:, 0], token if self.adapter_config.looks_back else None

    def _optimise(self, objective: JointObjective, strategy: Strategy, history: AdapterHistory, step: int) -> None:
        if step == 0:
            self._validate(objective, history, 0)
        for epoch in range(step // self.feed.steps_per_epoch, self.config.epochs):
            started = time.perf_counter()
            for parts in self._parts(epoch, step - epoch * self.feed.steps_per_epoch):
                if history.stopped_early:
                    return
                torch.manual_seed(_mix_seed(self.seed, step, self.place.rank))
                objective.train()
                losses = self._learn(strategy, parts)
                strategy.step(self.learning_rate(step), self.config.clip)
                step += 1
                point = LossPoint(step, *self._mean(losses))
                if not math.isfinite(point.loss):
                    raise UserError(f"The loss became infinite or no number at step {step}: lower train.learning_rate.")
                history.train.append(point)
                if self.place.leads:
                    self.on_point("train", point)
                history.seconds += time.perf_counter() - started
                if step % self.config.validate_every == 0 or step == self.total_steps:
                    self._validate(objective, history, step)
                    history.peak_bytes = max(history.peak_bytes, peak_memory(self.place.device))
                    self._save(objective.adapter, strategy, history, step)
                started = time.perf_counter()

    def _parts(self, epoch: int, first: int) -> Iterator[list[Part]]:
        """An epoch's batches on the device, each in the parts that gradients are accumulated over."""
        count = min(self.config.accumulate, self.feed.pieces)  # every process takes as many
        return load((batch.split(count) for batch in self.feed.batches(epoch, first)), self.place.device)

    def _learn(self, strategy: Strategy, parts: Sequence[Part]) -> torch.Tensor:
        """Gradients of a batch, part by part; its losses `[3]` as `LossPoint` names them."""
        total = torch.zeros(3, dtype=torch.float64, device=self.place.device)
        for number, part in enumerate(parts):
            total += torch.stack(strategy.learn(part, last=number == len(parts) - 1))
        return total

    def _dev(self, most: int | None) -> Iterator[Batch]:
        if self.adapter_config.looks_back:
            return sequences_in_order(cast(SequenceRows, self.dev), most)
        return in_order(self.dev, most)

    @torch.no_grad()
    def _validate(self, objective: JointObjective, history: AdapterHistory, step: int) -> None:
        objective.eval()
        rows, losses = 0, torch.zeros(3, dtype=torch.float64, device=self.place.device)
        for batch, part in load_parts(self._dev(self.config.validation_rows), self.place.device):
            count = int(batch.wanted.sum())
            losses += torch.stack(objective(*part)).double() * count
            rows += count
        point = LossPoint(step, *self._agree(losses / rows))
        history.validation.append(point)
        if point.prediction < history.best_prediction:
            history.best_prediction, history.best_step, history.stale = point.prediction, step, 0
            if self.place.leads:
                self._write_best(objective.adapter)
        else:
            history.stale += 1
            history.stopped_early = history.stale >= self.config.patience
        if self.place.leads:
            self.on_point("validation", point)

    @torch.no_grad()
    def _fit_gate(self, adapter: PemaAdapter) -> tuple[float, float]:
        """Fit how far to trust the finished adapter, on the dev memory."""
        assert adapter.gate is not None
        objective = JointObjective(adapter, self.head, 0.0).eval()
        rows = []
        for _, (state, target, share, example) in load_parts(self._dev(self.config.validation_rows), self.place.device):
            x, _, loss, _ = objective.row_losses(state, target, share, example)
            wanted = share > 0
            plain = head_cross_entropy(self.head, self.head.norm(state[wanted]), target[wanted])
            rows.append((x, -loss, -plain))
        return fit_gate(adapter.gate, rows)

    def _agree(self, losses: torch.Tensor) -> list[float]:
        """The leading process's figures, for all: a rounding difference must not stop some workers and not others."""
        if self.place.world > 1:
            torch.distributed.broadcast(losses, src=0)
        return losses.tolist()

    def _mean(self, losses: torch.Tensor) -> list[float]:
        """Over all processes; one that is no number makes all of them give up together."""
        if self.place.world > 1:
            torch.distributed.all_reduce(losses)
        return (losses / self.place.world).tolist()

    def _meet(self) -> None:
        if self.place.world > 1:
            torch.distributed.barrier()

    # ── resume ──────────────────────────────────────────────────────────────

    @property
    def _checkpoint(self) -> Path:
        return self.run_dir / CHECKPOINT

    @cached_property
    def _log(self) -> PointLog:
        return PointLog(self.run_dir / _POINTS)

    @property
    def _best(self) -> Path:
        return self.run_dir / _BEST

    def _save(self, adapter: PemaAdapter, strategy: Strategy, history: AdapterHistory, step: int) -> None:
        moments = strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            self._write_checkpoint(adapter, moments, history, step)
        best = {"best_step": history.best_step, "best_prediction": history.best_prediction}
        self.on_saved({**asdict(history.validation[-1]), **best})

    def _write_checkpoint(
        self, adapter: PemaAdapter, moments: dict[str, torch.Tensor], history: AdapterHistory, step: int
    ) -> None:
        for kind in _KINDS:
            points = getattr(history, kind)
            self._log.append({"kind": kind, **asdict(point)} for point in points[self._logged[kind] :])
            self._logged[kind] = len(points)
        groups = {"adapter": adapter.state_dict(), "optimizer": moments}
        described = {"step": step, "history": history.without_points(), "points_bytes": self._log.size}
        save_checkpoint(self._checkpoint, groups, described)

    def _restore(self, adapter: PemaAdapter) -> tuple[int, AdapterHistory, dict[str, torch.Tensor]]:
        groups, described = load_checkpoint(self._checkpoint)
        try:
            adapter.load_state_dict(groups.get("adapter", {}))
            points = self._log.read(described["points_bytes"])
        except (RuntimeError, KeyError):
            raise UserError(
                f"{self._checkpoint}: holds an adapter of another shape, from another version perhaps. "
                "Start over with train.resume=false."
            ) from None
        history = described["history"]
        for point in points:
            history[point.pop("kind")].append(point)
        self._logged = Counter({kind: len(history[kind]) for kind in _KINDS})
        logger.info("training resumes at step %d", described["step"])
        return described["step"], AdapterHistory.from_dict(history), groups.get("optimizer", {})

    def _write_best(self, adapter: PemaAdapter) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._best) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in adapter.state_dict().items()}, temporary)


def _mix_seed(seed: int, *numbers: int) -> int:
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])
