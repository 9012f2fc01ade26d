"""How the vocabulary's distribution and the memories' become one: `gn`, `li`, and kNN-LM's second interpolation.

Each rule exists twice: of targets alone, for perplexity, and over the whole vocabulary, for the service and decoding.
Knows torch alone. Shapes: N queries, M entries, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def joint(log_vocab_N: Tensor, log_norm_N: Tensor, all_N: Tensor, hit_N: Tensor) -> Tensor:
    """`gn`, equation 2 at τ: log of (P_vocab(x) Z_v + Σ_hit exp(sim/θ)) / (Z_v + Σ_all exp(sim/θ)).

    Args:
        log_vocab_N: log P_vocab of the targets; log_norm_N: log Z_v.
        all_N, hit_N: log sums over the memories, those in one normaliser added up beforehand.
    """
    return torch.logaddexp(log_vocab_N + log_norm_N, hit_N) - torch.logaddexp(log_norm_N, all_N)


def linear(log_p_N: Tensor, all_N: Tensor, hit_N: Tensor, weight: float) -> Tensor:
    """`li`: log of (1 - λ) P + λ P_mem, where P_mem = Σ_hit / Σ_all; with an empty memory it is P.

    Equation 3 of kNN-LM, and the continuous cache's (Grave et al., 2017).
    """
    log_memory_N = torch.where(all_N.isfinite(), hit_N - all_N, log_p_N)
    if weight <= 0:
        return log_p_N
    if weight >= 1:
        return log_memory_N
    return torch.logaddexp(log_p_N + math.log1p(-weight), log_memory_N + math.log(weight))


def memory_mass(similarity_NM: Tensor, token_NM: Tensor, temperature: float, vocabulary: int) -> Tensor:
    """`[N, V]`: log Σ exp(sim/θ) over the entries of each token; -inf for tokens without one."""
    score_NM = similarity_NM / temperature
    highest_N = score_NM.amax(1, keepdim=True) if score_NM.shape[1] else score_NM.new_zeros(len(score_NM), 1)
    highest_N = torch.where(highest_N.isfinite(), highest_N, torch.zeros_like(highest_N))
    mass_NV = score_NM.new_zeros(len(score_NM), vocabulary)
    mass_NV.scatter_add_(1, token_NM.expand_as(score_NM), (score_NM - highest_N).exp())
    return mass_NV.log() + highest_N


def joint_over_vocabulary(log_vocab_NV: Tensor, log_norm_N: Tensor, mass_NV: Tensor) -> Tensor:
    """`gn` for every word: log P `[N, V]`."""
    joint_NV = torch.logaddexp(log_vocab_NV + log_norm_N[:, None], mass_NV)
    return joint_NV - torch.logaddexp(log_norm_N, mass_NV.logsumexp(1))[:, None]


def linear_over_vocabulary(log_p_NV: Tensor, mass_NV: Tensor, weight: float) -> Tensor:
    """`li` for every word: log P `[N, V]`."""
    all_N = mass_NV.logsumexp(1)
    flat = linear(log_p_NV.flatten(), all_N[:, None].expand_as(mass_NV).flatten(), mass_NV.flatten(), weight)
    return flat.view_as(log_p_NV)
