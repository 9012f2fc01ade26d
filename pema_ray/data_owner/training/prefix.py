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
    """Representations behind a prefix; the PLM owner computes their backward pass.

    The prefix crosses the line in the PLM's number format, and gradients in 16 bits where the PLM has 16.
    """

    @staticmethod
    def forward(
        ctx: Any, embeddings_nW: torch.Tensor, objective: PrefixObjective, batch: ExtractBatch, is_training: bool
    ) -> torch.Tensor:
        plm, dtype = objective.plm, objective.joint.head.dtype
        current = objective.model.start.replaced(embeddings_nW.detach().to(dtype))
        if current.handle != objective.put_handle:  # a validation has many batches
            plm.put_prefix(current)
            objective.put_handle = current.handle
        asked = replace(batch, handle=current.handle, for_gradient=is_training)
        ctx.plm, ctx.batches = plm, asked.split(objective.requests)
        ctx.dtype = dtype if dtype.itemsize > 2 else torch.bfloat16  # float16 has no small numbers
        state_NH = torch.cat(plm.extract_all(ctx.batches))
        # A copy: an inference tensor in a graph gives wrong gradients, without an error.
        return state_NH.to(torch.promote_types(state_NH.dtype, torch.float32), copy=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        parts = ctx.plm.gradients(ctx.batches, grad_outputs[0].to(ctx.dtype))
        return torch.stack([part.to(grad_outputs[0].dtype) for part in parts]).sum(0), None, None, None


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
    """The cross-entropy of the targets behind the prefix, under the adapter.

    Args:
        requests: that a batch is sent in, side by side.
    """

    def __init__(self, model: PrefixAndAdapter, plm: BlockingPLM, head: LMHead, requests: int = 1) -> None:
        super().__init__()
        self.model, self.plm, self.requests = model, plm, requests
        self.put_handle = ""
        """Of the prefix that was put last."""
        self.joint = JointObjective(model.adapter, head, kappa=0.0)

    def forward(self, batch: ExtractBatch, target_N: torch.Tensor) -> tuple[torch.Tensor]:
        """Mean over the targets, one for each requested representation."""
        state_NH = _RemoteStates.apply(self.model.embeddings_nW, self, batch, torch.is_grad_enabled())
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
        return PrefixObjective(self.model, self.plm, self.head, self.settings.requests)

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
