"""TRIME's training loss (equations 2 and 3): vocabulary and memory share one normaliser. Knows torch alone.

P(w|c) ∝ exp(E_w · f) + Σ_{(c_j, x_j) ∈ M, x_j = w} exp(g · g_j / √H)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pema_ray.trime.model.memory_lm import VocabularyScore
from pema_ray.trime.objective.softmax import MemoryScore


def joint_log_prob(vocabulary: VocabularyScore, memory: MemoryScore | None) -> Tensor:
    """log P(x|c) `[N]` of equation 2; without a memory, that of the language model alone.

    The target's mass is `log_prob + n_v` from the vocabulary and `log_positive` from the memory (absent if it is -inf);
    the normaliser is `logsumexp(n_v, n_m)`. Of an adaptive softmax, n_v is the head cluster's.
    """
    if memory is None:
        return vocabulary.log_prob_N
    n_v_N = vocabulary.log_normaliser_N
    mass_N = torch.logaddexp(vocabulary.log_prob_N + n_v_N, memory.log_positive)
    return mass_N - torch.logaddexp(n_v_N, memory.log_normaliser)
