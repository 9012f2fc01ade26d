"""Chooses T and λ by the likelihood of dev targets, teacher-forced, with their neighbours. Knows torch alone.

Shapes: N target positions, K neighbours, G temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pema_ray.memory.search.nearest import Neighbours
from pema_ray.trime.evaluation.combination import joint, linear
from pema_ray.trime.evaluation.similarity import log_sums
from pema_ray.trime.translation.data import Parallel, padded
from pema_ray.trime.translation.decode import Mixing
from pema_ray.trime.translation.model import Translator

_BATCH = 16  # pairs


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Log-probabilities of the network, and similarities of the neighbours, of each target."""

    log_prob_N: Tensor
    log_normaliser_N: Tensor
    similarity_NK: Tensor
    hit_NK: Tensor
    hidden: int


@torch.inference_mode()
def score_targets(model: Translator, eos: int, pairs: Parallel, search: Neighbours, neighbours: int) -> TargetScores:
    """Score the pairs, teacher-forced."""
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(pairs), _BATCH):
        rows = slice(first, first + _BATCH)
        source_BS = torch.from_numpy(padded([[*s, eos] for s in pairs.source[rows]], model.pad)).to(device)
        input_BT = torch.from_numpy(padded([[model.start, *t] for t in pairs.target[rows]], model.pad)).to(device)
        label_BT = torch.from_numpy(padded([[*t, eos] for t in pairs.target[rows]], -1)).to(device)
        state_BTH, key_BTH = model.represent(source_BS, input_BT)
        label_N = label_BT[label_BT >= 0]
        logits_NV = model.logits(state_BTH[label_BT >= 0]).float()
        normaliser_N = logits_NV.logsumexp(-1)
        nearest = search.search(key_BTH[label_BT >= 0].float().cpu().numpy(), neighbours)
        log_prob_N = logits_NV.gather(1, label_N[:, None])[:, 0] - normaliser_N
        hit_NK = nearest.token_NK == label_N.cpu()[:, None]
        parts.append((log_prob_N.cpu(), normaliser_N.cpu(), nearest.similarity_NK, hit_NK))
    log_prob_N, normaliser_N, similarity_NK, hit_NK = (torch.cat(column) for column in zip(*parts))
    return TargetScores(log_prob_N, normaliser_N, similarity_NK, hit_NK, model.hidden_size)


def nll(scores: TargetScores, mixing: Mixing) -> float:
    """Mean -log P of the targets, nats."""
    sums = log_sums(scores.similarity_NK, scores.hit_NK, [scores.hit_NK.shape[1]], [mixing.theta(scores.hidden)])
    all_N, hit_N = sums.at(0, 0)
    if mixing.system == "trime":
        return -float(joint(scores.log_prob_N, scores.log_normaliser_N, all_N, hit_N).double().mean())
    return -float(linear(scores.log_prob_N, all_N, hit_N, mixing.weight).double().mean())


def calibrate(scores: TargetScores, mixing: Mixing, temperatures: Sequence[float], weights: Sequence[float]) -> Mixing:
    """The best temperature (and weight, where the system has one)."""
    candidates = [
        replace(mixing, temperature=t, weight=w)
        for t in temperatures
        for w in (weights if mixing.system == "knn" else (0.0,))
    ]
    return candidates[0] if len(candidates) == 1 else min(candidates, key=lambda candidate: nll(scores, candidate))
