"""TRIME's objective for translation: the vocabulary, and the keys of all other target sentences of the batch.

P(w|c) ∝ exp(E_w · f) + Σ_j exp(g · g_j / (√H · temp)), over the k nearest g_j whose next token is w; sentences never
see themselves. The k nearest are chosen before the normaliser and the positives. Knows torch alone.

Shapes: N target positions of this process, M those of all, K of the nearest, H hidden, V vocabulary, C a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pema_ray.trime.model.memory_lm import VocabularyScore
from pema_ray.trime.objective.gather import gather_rows
from pema_ray.trime.objective.loss import joint_log_prob
from pema_ray.trime.objective.memories import PADDING
from pema_ray.trime.objective.softmax import CHUNK, MemoryScore
from pema_ray.trime.translation.model import Translator


class MtMemoryMode(NamedTuple):
    """Which memory a batch sees."""

    memory: bool
    """Off: cross-entropy."""
    temperature: float = 10.0
    top_k: int | None = 8


class MtObjective(nn.Module):
    """Training loss of a batch; `forward` returns sums, so that parts of an update add up."""

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        source_BS: Tensor,
        input_BT: Tensor,
        label_BT: Tensor,
        sentence_B: Tensor,
        mode: MtMemoryMode,
        divisor: float,
    ) -> tuple[Tensor, Tensor]:
        """(loss, sums): `loss` is the summed -log P over `divisor`; `sums` float64 `[2]` are -log P of the objective
        and that of the vocabulary alone, in nats.

        Args:
            source_BS: padded with the model's padding; label_BT: int64, `PADDING` where there is none.
            sentence_B: numbers of the sentences, unique within the group.
            divisor: target tokens of the update / number of processes, since strategies average over processes.
        """
        state_BTH, key_BTH = self.model.represent(source_BS, input_BT)
        counts_BT = label_BT != PADDING
        label_N = label_BT[counts_BT]
        logits_NV = self.model.logits(state_BTH[counts_BT]).float()
        normaliser_N = logits_NV.logsumexp(-1)
        log_prob_N = logits_NV.gather(1, label_N[:, None])[:, 0] - normaliser_N
        vocabulary = VocabularyScore(log_prob_N, normaliser_N)
        memory = None
        if mode.memory:
            sentence_N = sentence_B[:, None].expand_as(label_BT)[counts_BT]
            memory = other_sentences(key_BTH[counts_BT], label_N, sentence_N, mode.temperature, mode.top_k)
        nll_N = -joint_log_prob(vocabulary, memory)
        sums = torch.stack([nll_N.detach().double().sum(), -log_prob_N.detach().double().sum()])
        return nll_N.sum() / divisor, sums


def other_sentences(
    key_NH: Tensor, label_N: Tensor, sentence_N: Tensor, temperature: float, top_k: int | None, chunk: int = CHUNK
) -> MemoryScore:
    """Both sums over the positions of other sentences, of all processes, differentiable in queries and keys.

    The nearest are found without a gradient, in chunks; then only their inner products are computed again, so that the
    backward pass keeps N × K of them, not N × M.
    """
    memory = gather_rows(key_NH, torch.stack([label_N, sentence_N], 1))
    label_M, sentence_M = memory.tag_MC.unbind(1)
    k = len(label_M) if top_k is None else min(top_k, len(label_M))
    nearest_NK = _nearest(key_NH, memory.key_MH, sentence_N, sentence_M, k, chunk)
    scale = 1 / (math.sqrt(key_NH.shape[-1]) * temperature)
    score_NK = torch.linalg.vecdot(key_NH[:, None].float(), memory.key_MH[nearest_NK].float()) * scale
    seen_NK = sentence_M[nearest_NK] != sentence_N[:, None]
    hit_NK = seen_NK & (label_M[nearest_NK] == label_N[:, None])
    return MemoryScore(_log_sum(score_NK, hit_NK), _log_sum(score_NK, seen_NK))


@torch.no_grad()
def _nearest(key_NH: Tensor, key_MH: Tensor, sentence_N: Tensor, sentence_M: Tensor, k: int, chunk: int) -> Tensor:
    """`[N, K]`: the most similar memories; those of the query's own sentence come last."""
    parts = [torch.empty(0, k, dtype=torch.int64, device=key_NH.device)]
    step = max(1, chunk // max(1, len(key_MH)))
    for first in range(0, len(key_NH), step):
        rows = slice(first, first + step)
        similarity_CM = (key_NH[rows] @ key_MH.mT).float()
        similarity_CM.masked_fill_(sentence_M == sentence_N[rows, None], -math.inf)
        parts.append(similarity_CM.topk(k, dim=1).indices)
    return torch.cat(parts)


def _log_sum(score_NK: Tensor, counts_NK: Tensor) -> Tensor:
    """log Σ exp over the scores that count `[N]`; -inf without a gradient where none does."""
    none_N = ~counts_NK.any(1)
    safe_NK = score_NK.masked_fill(~counts_NK & ~none_N[:, None], -math.inf)
    if not score_NK.shape[1]:
        return score_NK.new_full((len(score_NK),), -math.inf)
    return safe_NK.logsumexp(1).masked_fill(none_N, -math.inf)
