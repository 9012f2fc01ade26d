"""The losses (paper section 3.3): `L = κ L_rct + (1 - κ) L_pd`. N rows, H hidden, V vocabulary.

Cross-entropy runs over chunks of rows, so that the logits `[N, V]` never exist at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.line import LMHead

_CHUNK = 512  # rows whose logits are held at once


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """The cross-entropy of every row under a frozen head, and its gradient, in one pass over chunks.

    The forward pass already has all that the gradient `(softmax - onehot) W` needs: each chunk's logits become their
    gradient in place. Two matrix products per row and `[chunk, V]` of memory. (torch's `linear_cross_entropy` was 3.4
    times slower on the CPU at 2,048 rows and V = 49,152: see docs/log.md.)
    """

    @staticmethod
    def forward(ctx: Any, x_NH: torch.Tensor, target_N: torch.Tensor, head: LMHead) -> torch.Tensor:
        weight = head.weight
        grad = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        buffer = torch.empty(min(_CHUNK, len(x_NH)), head.vocab_size, dtype=weight.dtype, device=weight.device)
        loss = torch.empty(len(x_NH), device=weight.device)
        for start in range(0, len(x_NH), _CHUNK):
            x, target = x_NH[start : start + _CHUNK].to(weight.dtype), target_N[start : start + _CHUNK, None]
            raw = torch.mm(x, weight.T, out=buffer[: len(x)])
            logits = _finish_logits(raw.float(), head)
            log_z = logits.logsumexp(-1, keepdim=True)
            loss[start : start + _CHUNK] = (log_z - logits.gather(1, target))[:, 0]
            if grad is not None:
                slope = _slope(logits, head)
                probability = logits.sub_(log_z).exp_()
                probability.scatter_add_(1, target, -torch.ones_like(target, dtype=probability.dtype))
                grad[start : start + _CHUNK] = probability.mul_(slope).to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0][:, None], None, None


def _finish_logits(raw: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Bias, scale and soft cap, in place: what `LMHead.logits` does after the matrix product."""
    if head.bias is not None:
        raw += head.bias.float()
    if head.spec.logit_scale != 1.0:
        raw *= head.spec.logit_scale
    if head.spec.logit_softcap is not None:
        raw.div_(head.spec.logit_softcap).tanh_().mul_(head.spec.logit_softcap)
    return raw


def _slope(logits: torch.Tensor, head: LMHead) -> torch.Tensor | float:
    """The derivative of the finished logits with respect to the matrix product."""
    if head.spec.logit_softcap is None:
        return head.spec.logit_scale
    return (1 - (logits / head.spec.logit_softcap).square()) * head.spec.logit_scale


def head_cross_entropy(head: LMHead, normed_NH: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the frozen head's prediction, float32 `[N]`, with a gradient to `normed_NH` alone."""
    return _FrozenHeadCrossEntropy.apply(normed_NH, target_N, head)  # type: ignore[no-any-return]


class JointObjective(nn.Module):
    """The loss of stages 2 (κ = 0) and 3 (κ > 0) as a module, so that DDP can wrap it."""

    def __init__(self, adapter: PemaAdapter, head: LMHead, kappa: float) -> None:
        super().__init__()
        self.adapter, self.head, self.kappa = adapter, head, kappa

    def forward(
        self,
        state_NH: torch.Tensor,
        target_N: torch.Tensor,
        share_N: torch.Tensor | None = None,
        example_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(L, L_rct, L_pd)` of a batch; dropout is on exactly while the module is in training mode.

        Args:
            share_N: each row's share of the losses; 1/N by default.
            example_N: the sequence of each row, for adapters that look back; rows of share 0 are context only.
        """
        x, down, loss_N, share_N = self.row_losses(state_NH, target_N, share_N, example_N)
        prediction = loss_N.mean() if share_N is None else loss_N @ share_N
        if self.kappa == 0 and self.training:
            return prediction, prediction.new_zeros(()), prediction.detach()
        if self.adapter.look_back is not None:  # reconstruct what the PLM owner sent, not the attended rows
            down = self.adapter.project(x, drop=self.training)
        reconstruction = _squared_error(F.linear(down, self.adapter.B_rct), x, share_N)
        loss = self.kappa * reconstruction + (1 - self.kappa) * prediction
        return loss, reconstruction.detach(), prediction.detach()

    def row_losses(
        self,
        state_NH: torch.Tensor,
        target_N: torch.Tensor,
        share_N: torch.Tensor | None = None,
        example_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`(x, A x, -log P_PEMA of the target, share)` of the rows that have a share; arguments as in `forward`."""
        adapter, shares = self.adapter, None
        x = attended = adapter.enter(state_NH, self.head)
        if adapter.config.looks_back:
            if example_N is None or share_N is None:
                raise ValueError("this adapter looks back: its rows need their sequences and shares")
            is_target = share_N > 0
            attended = adapter.look(x, target_N, example_N, self.head)[is_target]
            if adapter.local_memory is not None:
                shares = [part[is_target] for part in adapter.recall(x, target_N, example_N)]
            x, target_N, share_N = x[is_target], target_N[is_target], share_N[is_target]
        down = adapter.project(attended, drop=self.training)
        h_pd = F.linear(down, adapter.B_pd)
        h_pd = attended + h_pd if adapter.config.residual else h_pd
        loss_N = head_cross_entropy(self.head, adapter.leave(h_pd, self.head), target_N)
        if shares is not None:
            log_adapter_N, log_memory_N = shares
            loss_N = -torch.logaddexp(log_adapter_N - loss_N, log_memory_N)
        return x, down, loss_N, share_N


def _squared_error(predicted_NH: torch.Tensor, x_NH: torch.Tensor, share_N: torch.Tensor | None) -> torch.Tensor:
    if share_N is None:
        return F.mse_loss(predicted_NH, x_NH)
    return (predicted_NH - x_NH).square().mean(-1) @ share_N


class ReconstructionObjective(nn.Module):
    """`L_rct` for the gradient solver of stage 1 (the published one)."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, dropout: float, scale: float = 1.0) -> None:
        super().__init__()
        self.A, self.B, self.dropout, self.scale = nn.Parameter(A), nn.Parameter(B), dropout, scale

    def forward(self, x_NH: torch.Tensor, share_N: torch.Tensor | None = None) -> torch.Tensor:
        down = F.linear(F.dropout(x_NH, self.dropout, self.training), self.A) * self.scale
        return _squared_error(F.linear(down, self.B), x_NH, share_N)
