"""Training a prefix through the gradient line, with PEMA's adapter. Knows no Ray.

The PLM owner computes states and, from the gradient of the loss with respect to them, the gradient of the prefix. The
loss, the targets, the adapter and the optimiser stay here. n positions, N rows, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.data_owner.training.objectives import JointObjective
from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, ExtractBatch, LMHead
from pema_ray.line.prefix import Prefix


class _RemoteStates(torch.autograd.Function):
    """Representations behind a prefix; the PLM owner computes their backward pass."""

    @staticmethod
    def forward(
        ctx: Any, embeddings_nW: torch.Tensor, prefix: Prefix, plm: BlockingPLM, batch: ExtractBatch
    ) -> torch.Tensor:
        current = prefix.replaced(embeddings_nW.detach())
        plm.put_prefix(current)
        ctx.plm, ctx.batch = plm, replace(batch, handle=current.handle)
        return plm.extract(ctx.batch).clone()  # an inference tensor cannot be part of a graph

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.plm.gradient(ctx.batch, grad_outputs[0]), None, None, None


class PrefixObjective(nn.Module):
    """The loss of a prefix and an adapter.

    Args:
        start: its first positions (`start.frozen`) stay as they are.
        adapter: a new residual adapter leaves the PLM's distribution as it is.

    Raises:
        UserError: all positions are frozen.
    """

    def __init__(self, start: Prefix, plm: BlockingPLM, head: LMHead, adapter: PemaAdapter) -> None:
        super().__init__()
        if start.frozen == len(start):
            raise UserError(f"All {len(start)} positions of the prefix are frozen: there is nothing to train.")
        self._start, self._plm = start, plm
        self.frozen: torch.Tensor
        self.register_buffer("frozen", start.embeddings[: start.frozen].clone())
        self.embeddings = nn.Parameter(start.embeddings[start.frozen :].clone())
        self.joint = JointObjective(adapter, head, kappa=0.0)

    @property
    def prefix(self) -> Prefix:
        """As it is now."""
        return self._start.replaced(torch.cat([self.frozen, self.embeddings]).detach())

    def states(self, batch: ExtractBatch) -> torch.Tensor:
        """Representations `[N, H]` behind the prefix."""
        embeddings_nW = torch.cat([self.frozen, self.embeddings])
        return _RemoteStates.apply(embeddings_nW, self._start, self._plm, batch)  # type: ignore[no-any-return]

    def forward(self, batch: ExtractBatch, target_N: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the targets, one for each requested representation."""
        return self.joint(self.states(batch), target_N)[0]
