"""The training of an adapter: reconstruction (the paper's stage 1), then prediction (its stages 2 and 3). Knows no Ray.

N rows, H hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

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
from pema_ray.training import schedules
from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import StepInputs, Trainer, mix_seed


@dataclass
class AdapterHistory(TrainerHistory):
    """The course of a training run. Points have `reconstruction` (mean squared error), `prediction` (nats) and
    `loss`, the sum of both weighted by κ and 1 - κ."""

    reconstruction_error: float | None = None
    reconstruction_seconds: float = 0.0
    """Of stage 1, without measuring on the dev memory."""
    rows: int = 0
    total_steps: int = 0
    lambda_nll: list[float] | None = None
    """If λ is predicted: NLL of held-out rows at the best constant λ, and at the predicted one."""


@dataclass
class AdapterTrainer(Trainer[TrainConfig, AdapterHistory]):
    """Trains one adapter.

    Args:
        train: rows (whole sequences for an adapter that looks back, as in `dev`), shards (for
            `settings.shuffle: window`), or a batch sampler.
    """

    adapter_config: AdapterConfig
    settings: TrainConfig
    head: LMHead
    train: Rows | ShardedRows | BatchSampler
    dev: Rows
    run_dir: Path
    seed: int = 0
    place: Place = field(default_factory=Place)
    on_point: OnPoint = lambda kind, point: None
    on_saved: OnSaved = lambda metrics: None
    history: AdapterHistory = field(default_factory=AdapterHistory)

    def run(self) -> AdapterHistory:
        """Stage 1, then stage 2 or 3; leaves the best adapter by dev prediction loss in `model`, on the CPU."""
        self.head.to(self.place.device)
        history = super().run()
        if self.settings.predict_lambda and self.place.leads:
            history.lambda_nll = list(self._fit_gate())
        self.model.eval().cpu()
        return history

    @cached_property
    def model(self) -> PemaAdapter:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)  # without stage 1, training starts from this draw of A
            return PemaAdapter(self.adapter_config)

    @cached_property
    def objective(self) -> JointObjective:
        return JointObjective(self.model, self.head, self.settings.kappa).to(self.place.device)

    @cached_property
    def sampler(self) -> BatchSampler:
        """This process's batches."""
        c, place = self.settings, self.place
        if isinstance(self.train, BatchSampler):
            return self.train
        if self.adapter_config.looks_back:
            return SequenceShuffle(cast(SequenceRows, self.train), c.batch_size, self.seed, place.rank, place.world)
        if isinstance(self.train, Rows):
            return GlobalShuffle(self.train, c.batch_size, self.seed, place.rank, place.world)
        return WindowShuffle(self.train, c.window_shards, c.batch_size, c.epochs, self.seed, place.rank, place.world)

    @property
    def steps(self) -> int:
        return self.sampler.steps_per_epoch * self.settings.epochs

    # ── stage 1 ─────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Stage 1."""
        adapter, history = self.model, self.history
        history.rows, history.total_steps = self.sampler.rows, self.steps
        started = time.perf_counter()
        dev_seconds = 0.0
        if self.settings.solver == "closed_form":
            A, B = self._solve()
        elif self.settings.solver == "adam":
            A, B, dev_seconds = self._reconstruct_by_gradient()
        else:
            return
        history.reconstruction_seconds = time.perf_counter() - started - dev_seconds
        history.reconstruction_error = self._dev_reconstruction_error(A, B)
        if self.settings.fresh_maps:
            with torch.no_grad():
                adapter.B_rct.copy_(B / adapter.config.scale)
        else:
            adapter.start_from_reconstruction(A, B)

    def _dev_reconstruction_error(self, A: torch.Tensor, B: torch.Tensor) -> float:
        dev = (self._enter(batch.key.take(batch.is_target)) for batch in self._dev_batches(None))
        return reconstruction_error(A, B, dev)

    @torch.no_grad()
    def _solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every process sums its own rows; the leading one solves, so that all start from the same bits."""
        moment = SecondMoment(self.adapter_config.hidden_size, self.place.device)
        for rows in self.sampler.row_blocks():
            weight = None if rows.weight is None else torch.from_numpy(rows.weight).to(self.place.device)
            moment.add(self._enter(rows.key.take(slice(None))), weight)
        self.place.all_reduce(moment.M)
        moment.rows = int(self.place.all_reduce(torch.tensor(moment.rows, device=self.place.device)))
        if self.place.leads:
            A, B, _ = solve(moment, self.adapter_config.rank)
        else:
            A, B = torch.empty_like(self.model.A), torch.empty_like(self.model.B_rct)
        return self.place.broadcast(A.to(self.place.device)), self.place.broadcast(B.to(self.place.device))

    def _reconstruct_by_gradient(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The published stage 1; every process trains on all rows.

        Returns:
            `(A, B)` with the lowest error on dev, and the seconds spent on measuring it.
        """
        c, device = self.settings, self.place.device
        if not isinstance(self.train, Rows):
            raise UserError(
                "train.solver=adam needs train.shuffle=global and no train.stream; the closed form needs neither."
            )
        scale = self.adapter_config.scale
        A, B = (map.detach().clone() for map in (self.model.A, self.model.B_rct))
        objective = ReconstructionObjective(A, B, c.dropout, scale).to(device)
        optimizer = torch.optim.Adam(objective.parameters(), lr=c.learning_rate)
        sampler = GlobalShuffle(self.train, c.reconstruction_batch_size, self.seed)
        best, stale, taken_steps = (math.inf, objective.A.detach().clone(), objective.B.detach() * scale), 0, 0
        dev_seconds = 0.0
        total_steps = c.reconstruction_epochs * sampler.steps_per_epoch
        for epoch in range(c.reconstruction_epochs):
            for step, (_, (state, _, share, _)) in enumerate(load_parts(sampler.batches(epoch), device)):
                torch.manual_seed(mix_seed(self.seed, epoch, step))
                with torch.no_grad():
                    x = self.model.enter(state, self.head)
                loss = objective(x, share)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                taken_steps += 1
                if taken_steps % c.validate_every and taken_steps < total_steps:
                    continue
                started = time.perf_counter()
                A, B = objective.A.detach().clone(), objective.B.detach() * scale
                error = torch.tensor([self._dev_reconstruction_error(A, B)], dtype=torch.float64)
                agreed = float(self.place.broadcast(error.to(device)))
                best, stale = ((agreed, A, B), 0) if agreed < best[0] else (best, stale + 1)
                dev_seconds += time.perf_counter() - started
                if stale >= c.patience:
                    return *best[1:], dev_seconds
        return *best[1:], dev_seconds

    @torch.no_grad()
    def _enter(self, keys: Keys) -> torch.Tensor:
        data, scale = (None if t is None else t.to(self.place.device) for t in keys.tensors())
        assert data is not None
        return self.model.enter(decode(data, scale, keys.dtype), self.head)

    # ── stages 2 and 3 ──────────────────────────────────────────────────────

    @property
    def validate_every(self) -> int:
        return self.settings.validate_every

    @property
    def patience(self) -> int:
        return self.settings.patience

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant as published, or a cosine down to `final_learning_rate`."""
        c = self.settings
        return schedules.learning_rate(
            step,
            "constant" if c.final_learning_rate is None else "cosine",
            c.learning_rate,
            total_steps=self.steps,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate or 0.0,
        )

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def make_optimizer(self, named: Sequence[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter for _, parameter in named], lr=self.settings.learning_rate)

    def idle_inputs(self) -> Part:
        """A row of share 0."""
        zero_1H = torch.zeros(1, self.adapter_config.hidden_size, device=self.place.device)
        token = zero_1H[:, 0].long()
        return zero_1H, token, zero_1H[:, 0], token if self.adapter_config.looks_back else None

    @property
    def parts_per_step(self) -> int:
        return min(self.settings.accumulate, self.sampler.max_parts)  # every process takes as many

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        """Batches on the device, each in its parts for gradient accumulation."""
        first_epoch, first_step = divmod(first, self.sampler.steps_per_epoch)
        for epoch in range(first_epoch, self.settings.epochs):
            batches = self.sampler.batches(epoch, first_step if epoch == first_epoch else 0)
            for _, parts in load((batch.split(self.parts_per_step) for batch in batches), self.place.device):
                yield StepInputs(parts, self.place.world)

    def point(self, sums: torch.Tensor, count: float) -> Point:
        return self._losses(sums / count)

    @staticmethod
    def _losses(losses: torch.Tensor) -> Point:
        return dict(zip(("loss", "reconstruction", "prediction"), losses.tolist(), strict=True))

    def _dev_batches(self, max_rows: int | None) -> Iterator[Batch]:
        if self.adapter_config.looks_back:
            return sequences_in_order(cast(SequenceRows, self.dev), max_rows)
        return in_order(self.dev, max_rows)

    def validation(self) -> Point:
        rows, losses = 0, torch.zeros(3, dtype=torch.float64, device=self.place.device)
        for batch, part in load_parts(self._dev_batches(self.settings.validation_rows), self.place.device):
            count = int(batch.is_target.sum())
            losses += torch.stack(self.objective(*part)).double() * count
            rows += count
        return self._losses(self.place.broadcast(losses / rows))

    def score(self, point: Point) -> float:
        return point["prediction"]

    @torch.no_grad()
    def _fit_gate(self) -> tuple[float, float]:
        """Fit the prediction of λ to the finished adapter, on the dev memory."""
        adapter = self.model
        assert adapter.gate is not None
        objective = JointObjective(adapter, self.head, 0.0).eval()
        rows = []
        dev = self._dev_batches(self.settings.validation_rows)
        for _, (state, target, share, example) in load_parts(dev, self.place.device):
            x, _, loss, _ = objective.row_losses(state, target, share, example)
            is_target = share > 0
            plm_loss = head_cross_entropy(self.head, self.head.norm(state[is_target]), target[is_target])
            rows.append((x, -loss, -plm_loss))
        return fit_gate(adapter.gate, rows)
