"""Training a prefix through the gradient line, together with an adapter. Knows no Ray.

The PLM owner computes states and, from the gradient of the loss with respect to them, the gradient of the prefix. The
loss, the targets, the adapter and the optimiser stay here. n positions, W numbers of each, N rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.config import PrefixConfig
from pema_ray.data_owner.training.objectives import JointObjective
from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, ExtractBatch, LMHead
from pema_ray.line.prefix import Prefix
from pema_ray.training import schedules
from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import StepInputs, Trainer, mix_seed

_LAST_RATE = 0.02  # of the highest
_WARM_UP_STEPS = 8


class _RemoteStates(torch.autograd.Function):
    """Representations behind a prefix; the PLM owner computes their backward pass."""

    @staticmethod
    def forward(
        ctx: Any, embeddings_nW: torch.Tensor, prefix: Prefix, plm: BlockingPLM, batch: ExtractBatch
    ) -> torch.Tensor:
        current = prefix.replaced(embeddings_nW.detach())
        plm.put_prefix(current)
        ctx.plm, ctx.batch = plm, replace(batch, handle=current.handle)
        return plm.extract(ctx.batch).clone()  # an inference tensor in a graph gives wrong gradients, without an error

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.plm.gradient(ctx.batch, grad_outputs[0]), None, None, None


class PrefixAndAdapter(nn.Module):
    """What is trained: `start + scale · delta`, whose first positions stay as they are, and an adapter.

    Args:
        scale: how much further than the adapter's a step of Adam moves the prefix's numbers.

    Raises:
        UserError: all positions are frozen.
    """

    def __init__(self, start: Prefix, adapter: PemaAdapter, scale: float = 1.0) -> None:
        super().__init__()
        if start.frozen >= len(start):
            raise UserError(f"All {len(start)} positions of the prefix are frozen: there is nothing to train.")
        self.start, self.adapter, self.scale = start, adapter, scale
        self.delta = nn.Parameter(torch.zeros_like(start.embeddings[start.frozen :]))

    @property
    def embeddings_nW(self) -> torch.Tensor:
        """The prefix's numbers; gradients flow to `delta`."""
        frozen, trained = self.start.embeddings.split([self.start.frozen, len(self.delta)])
        return torch.cat([frozen, trained + self.scale * self.delta])

    @property
    def prefix(self) -> Prefix:
        """As it is now."""
        return self.start.replaced(self.embeddings_nW.detach())


class PrefixObjective(nn.Module):
    """The cross-entropy of the targets behind the prefix, under the adapter."""

    def __init__(self, model: PrefixAndAdapter, plm: BlockingPLM, head: LMHead) -> None:
        super().__init__()
        self.model, self._plm = model, plm
        self.joint = JointObjective(model.adapter, head, kappa=0.0)

    def forward(self, batch: ExtractBatch, target_N: torch.Tensor) -> tuple[torch.Tensor]:
        """Mean over the targets, one for each requested representation."""
        state_NH = _RemoteStates.apply(self.model.embeddings_nW, self.model.start, self._plm, batch)
        return (self.joint(state_NH, target_N)[0],)


@dataclass
class PrefixTrainer(Trainer[PrefixConfig, TrainerHistory]):
    """Trains a prefix on texts that follow prompts.

    Args:
        train, dev: batches, with the target of each requested representation.
    """

    settings: PrefixConfig
    plm: BlockingPLM
    head: LMHead
    start: Prefix
    train: Sequence[tuple[ExtractBatch, torch.Tensor]]
    dev: Sequence[tuple[ExtractBatch, torch.Tensor]]
    run_dir: Path
    seed: int = 0
    place: Place = field(default_factory=Place)
    on_point: OnPoint = lambda kind, point: None
    on_saved: OnSaved = lambda metrics: None
    history: TrainerHistory = field(default_factory=TrainerHistory)

    @cached_property
    def model(self) -> PrefixAndAdapter:
        c, hidden = self.settings, self.head.weight.shape[1]
        config = AdapterConfig(hidden, min(c.rank, hidden), "", "", residual=True)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            adapter = PemaAdapter(config)
        nn.init.zeros_(adapter.B_pd)  # it begins as the PLM
        return PrefixAndAdapter(self.start, adapter, c.prefix_learning_rate / c.learning_rate)

    @cached_property
    def objective(self) -> PrefixObjective:
        return PrefixObjective(self.model, self.plm, self.head)

    @property
    def steps(self) -> int:
        return len(self.train) * self.settings.epochs

    @property
    def batch_size(self) -> int:
        return self.settings.max_batch_tokens

    @property
    def validate_every(self) -> int:
        return self.settings.validate_every

    @property
    def patience(self) -> int:
        return self.settings.patience

    def learning_rate(self, step: int) -> float:
        """Warm-up, then a cosine."""
        rate = self.settings.learning_rate
        return schedules.learning_rate(
            step,
            "cosine",
            rate,
            total_steps=self.steps,
            warm_up_steps=min(_WARM_UP_STEPS, self.steps // 2),
            last=_LAST_RATE * rate,
        )

    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter for _, parameter in named], lr=self.settings.learning_rate)

    def idle_inputs(self) -> tuple[Any, ...]:
        return self.train[0]

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        for step in range(first, self.steps):
            epoch, number = divmod(step, len(self.train))
            order = np.random.default_rng(mix_seed(self.seed, epoch)).permutation(len(self.train))
            yield StepInputs([self.train[order[number]]], 1)

    def point(self, sums: torch.Tensor, count: float) -> Point:
        return {"loss": float(sums[0]) / count}

    def validation(self) -> Point:
        losses = [float(self.objective(*batch)[0]) * len(batch[1]) for batch in self.dev]
        return {"loss": sum(losses) / sum(len(target) for _, target in self.dev)}
