"""Gradual Unrolling (paper section 3.4): `P = λ_t P_PEMA + (1 - λ_t) P_LM`. B sequences, V vocabulary, t step.

λ_0 = λ_max; a falling schedule then goes to the floor m over a length L:
quadratic `m + (1 - m)(λ_max (1 - t/L))²` (the published one), linear `m + (1 - m) λ_max (1 - t/L)`, both capped at
λ_max (with a high floor, the published formula would rise at first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pema_ray.data_owner.config import ScheduleKind
from pema_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class UnrollingSchedule:
    """λ as a function of the step and of each sequence's own length.

    Raises:
        UserError: `lambda_max` or `floor` outside [0, 1].
    """

    lambda_max: float
    kind: ScheduleKind = "constant"
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("lambda_max", self.lambda_max), ("floor", self.floor)):
            if not 0 <= value <= 1:
                raise UserError(f"generate.{name}={value}: λ must lie in [0, 1].")
        if self.kind != "constant" and self.floor > self.lambda_max:
            raise UserError(
                f"generate.floor={self.floor} lies above generate.lambda_max={self.lambda_max}: λ would rise."
            )

    def at(self, step: int, length: int) -> float:
        """λ of one sequence at `step` (from 0), falling over `length` ≥ 1 steps."""
        if self.kind == "constant" or step == 0:
            return self.lambda_max
        falling = self.lambda_max * max(0.0, 1 - step / max(1, length))
        falling = falling**2 if self.kind == "quadratic" else falling
        return min(self.lambda_max, self.floor + (1 - self.floor) * falling)


def mix(log_pema_BV: torch.Tensor, log_plm_BV: torch.Tensor, lam_B: torch.Tensor) -> torch.Tensor:
    """log of the mixture, mixed in probability space by log-sum-exp, float32 `[B, V]`."""
    lam = lam_B.float().reshape(-1, *[1] * (log_pema_BV.ndim - 1)).to(log_pema_BV.device)
    return torch.logaddexp(log_pema_BV + lam.log(), log_plm_BV + torch.log1p(-lam))
