"""The losses (paper section 3.3): `L = κ L_rct + (1 - κ) L_pd`. N rows, H hidden, V vocabulary.

The logits `[N, V]` are never held whole: cross-entropy runs over the head in chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pema_ray.data_owner.adapter import PemaAdapter
from pema_ray.line import LMHead

_CHUNK = 1024  # rows whose logits are held at once where torch's own chunking does not apply


def head_cross_entropy(head: LMHead, normed_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the frozen head's prediction, a scalar with a gradient to `normed_NH` alone."""
    scale = head.spec.logit_scale
    if head.spec.logit_softcap is None:
        bias = None if head.bias is None else head.bias * scale
        x = (normed_NH * scale if scale != 1.0 else normed_NH).to(head.dtype)
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, head.weight, target_N, linear_bias=bias, options=options).float()
    losses = [
        checkpoint(lambda x, y: F.cross_entropy(head.logits(x), y, reduction="sum"), x, y, use_reentrant=False)
        for x, y in zip(normed_NH.split(_CHUNK), target_N.split(_CHUNK), strict=True)
    ]
    return torch.stack(losses).sum() / len(target_N)


class JointObjective(nn.Module):
    """The loss of stages 2 (κ = 0) and 3 (κ > 0) as a module, so that DDP can wrap it."""

    def __init__(self, adapter: PemaAdapter, head: LMHead, kappa: float) -> None:
        super().__init__()
        self.adapter, self.head, self.kappa = adapter, head, kappa

    def forward(
        self, state_NH: torch.Tensor, target_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(L, L_rct, L_pd)` of a batch; dropout is on exactly while the module is in training mode."""
        adapter = self.adapter
        x = adapter.enter(state_NH, self.head)
        down = adapter.project(x, drop=self.training)
        h_pd = F.linear(down, adapter.B_pd)
        h_pd = x + h_pd if adapter.config.residual else h_pd
        prediction = head_cross_entropy(self.head, adapter.leave(h_pd, self.head), target_N)
        if self.kappa == 0 and self.training:
            return prediction, prediction.new_zeros(()), prediction.detach()
        reconstruction = F.mse_loss(F.linear(down, adapter.B_rct), x)
        loss = self.kappa * reconstruction + (1 - self.kappa) * prediction
        return loss, reconstruction.detach(), prediction.detach()


class ReconstructionObjective(nn.Module):
    """`L_rct` for the gradient solver of stage 1 (the published one)."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.A, self.B, self.dropout = nn.Parameter(A), nn.Parameter(B), dropout

    def forward(self, x_NH: torch.Tensor) -> torch.Tensor:
        down = F.linear(F.dropout(x_NH, self.dropout, self.training), self.A)
        return F.mse_loss(F.linear(down, self.B), x_NH)
