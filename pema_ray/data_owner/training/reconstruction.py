"""Stage 1, reconstruction, in closed form. N rows, H hidden, R rank.

`min ‖B A x - x‖²` over maps of rank R is principal component analysis without centring: with
`M = Σ x xᵀ` and its R leading eigenvectors U, `A = Uᵀ` and `B = U` are an exact optimum. One pass over
the memory replaces the published epochs of Adam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class SecondMoment:
    """Accumulates `M = Σ x xᵀ [H, H]` in float64, on the rows' device; `+=` merges two."""

    def __init__(self, hidden_size: int, device: torch.device | str = "cpu") -> None:
        self.M = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x_NH: torch.Tensor, weight_N: torch.Tensor | None = None) -> None:
        """Add rows, each as often as its weight says."""
        x = x_NH.float()
        times = x if weight_N is None else x * weight_N[:, None]
        self.M += (x.T @ times).double()
        self.rows += len(x) if weight_N is None else int(weight_N.sum())

    def __iadd__(self, moment: SecondMoment) -> SecondMoment:
        self.M += moment.M
        self.rows += moment.rows
        return self


def solve(moment: SecondMoment, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`(A [R, H], B_rct [H, R], error)`; error is the mean squared reconstruction error per element (L_rct)."""
    values, vectors = torch.linalg.eigh(moment.M.cpu())
    U = vectors[:, -rank:].flip(-1)
    hidden = len(values)
    error = float(values[: hidden - rank].clamp_min(0).sum() / (max(1, moment.rows) * hidden))
    return U.T.float().contiguous(), U.float().contiguous(), error


@torch.no_grad()
def reconstruction_error(A: torch.Tensor, B: torch.Tensor, batches: Iterable[torch.Tensor]) -> float:
    """`L_rct = mean((B A x - x)²)` over batches `[N, H]`."""
    total, count = 0.0, 0
    for x in batches:
        total += float((x @ A.T @ B.T - x).square().sum(dtype=torch.float64))
        count += x.numel()
    return total / max(1, count)
