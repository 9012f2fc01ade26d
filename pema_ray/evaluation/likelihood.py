"""Held-out negative log-likelihood of PLM, PEMA and their mixture on a memory's rows. N rows, H hidden, V tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from pema_ray.line import LMHead


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """log-probability of every row's target under both distributions, `[N]` each, in nats."""

    log_pema: np.ndarray
    log_plm: np.ndarray
    is_eos: np.ndarray

    def nll(self, lam: float, eos: bool = False) -> float:
        """Mean NLL of the mixture at a constant λ, over text rows or over EOS rows."""
        selected = self.is_eos == eos
        pema, plm = self.log_pema[selected], self.log_plm[selected]
        with np.errstate(divide="ignore"):
            mixed = np.logaddexp(pema + np.log(lam), plm + np.log1p(-lam))
        return float(-mixed.mean())


class Representations(Protocol):
    """`[n, H]`; indexing gives float32."""

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...


class Block(Protocol):
    """Some rows of a memory: `key [n, H]`, `target [n]`, and which of them (`is_target`) are measured."""

    @property
    def key(self) -> Representations: ...
    @property
    def target(self) -> np.ndarray: ...
    @property
    def is_target(self) -> np.ndarray: ...


@torch.inference_mode()
def token_likelihood(
    blocks: Iterable[Block], eos: Sequence[int], head: LMHead, pema_log_probs: Callable[[Any], torch.Tensor]
) -> TokenLikelihood:
    """Both likelihoods of every target row.

    Args:
        pema_log_probs: a block → log P_PEMA of its target rows `[n, V]`.
    """
    log_pema, log_plm, targets = [], [], []
    for block in blocks:
        device, mask = head.weight.device, block.is_target
        target = torch.from_numpy(block.target[mask].astype(np.int64)).to(device)[:, None]
        log_pema.append(pema_log_probs(block).gather(1, target)[:, 0].cpu().numpy())
        state = torch.from_numpy(np.ascontiguousarray(block.key[mask])).to(device).float()
        log_plm.append(head.log_probs(head.norm(state)).gather(1, target)[:, 0].cpu().numpy())
        targets.append(block.target[mask])
    pema, plm = (np.concatenate(parts).astype(np.float64) for parts in (log_pema, log_plm))
    return TokenLikelihood(pema, plm, np.isin(np.concatenate(targets), eos))
