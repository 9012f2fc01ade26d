"""Held-out negative log-likelihood of PLM, PEMA and their mixture on a memory's rows. N rows, H hidden, V tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pema_ray.line import LMHead

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """log-probability of every row's target under both distributions, `[N]` each, in nats."""

    log_pema: np.ndarray
    log_plm: np.ndarray
    is_eos: np.ndarray

    def nll(self, lam: float, eos: bool = False) -> float:
        """Mean NLL of the mixture at a constant λ, over text rows or over EOS rows."""
        chosen = self.is_eos == eos
        pema, plm = self.log_pema[chosen], self.log_plm[chosen]
        with np.errstate(divide="ignore"):
            mixed = np.logaddexp(pema + np.log(lam), plm + np.log1p(-lam))
        return float(-mixed.mean())


LogProbs = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def token_likelihood(
    key_NH: np.ndarray, target_N: np.ndarray, eos: Sequence[int], head: LMHead, pema_log_probs: LogProbs
) -> TokenLikelihood:
    """Both likelihoods of every row.

    Args:
        pema_log_probs: representations `[n, H]` → log P_PEMA `[n, V]`.
    """
    log_pema, log_plm = [], []
    for start in range(0, len(target_N), _CHUNK):
        device = head.weight.device
        state = torch.from_numpy(np.ascontiguousarray(key_NH[start : start + _CHUNK])).to(device).float()
        target = torch.from_numpy(target_N[start : start + _CHUNK].astype(np.int64)).to(device)[:, None]
        log_pema.append(pema_log_probs(state).gather(1, target)[:, 0].cpu().numpy())
        log_plm.append(head.log_probs(head.norm(state)).gather(1, target)[:, 0].cpu().numpy())
    return TokenLikelihood(
        np.concatenate(log_pema).astype(np.float64), np.concatenate(log_plm).astype(np.float64), np.isin(target_N, eos)
    )
