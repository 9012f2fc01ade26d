"""Chooses T and λ by the likelihood of dev targets, teacher-forced, once their neighbours are known. Knows torch alone.

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


@dataclass(frozen=True, slots=True)
class Heard:
    """What network and memory say of each target: `[N]`, `[N]`, `[N, K]`, `[N, K]`."""

    log_prob_N: Tensor
    log_normaliser_N: Tensor
    similarity_NK: Tensor
    hit_NK: Tensor
    hidden: int


@torch.inference_mode()
def listen(model: Translator, eos: int, pairs: Parallel, search: Neighbours, neighbours: int, batch: int = 16) -> Heard:
    """Go through the pairs, teacher-forced."""
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(pairs), batch):
        rows = slice(first, first + batch)
        source_BS = torch.from_numpy(padded([[*s, eos] for s in pairs.source[rows]], model.pad)).to(device)
        input_BT = torch.from_numpy(padded([[model.start, *t] for t in pairs.target[rows]], model.pad)).to(device)
        label_BT = torch.from_numpy(padded([[*t, eos] for t in pairs.target[rows]], -1)).to(device)
        state_BTH, key_BTH = model.represent(source_BS, input_BT)
        label_N = label_BT[label_BT >= 0]
        logits_NV = model.logits(state_BTH[label_BT >= 0]).float()
        normaliser_N = logits_NV.logsumexp(-1)
        found = search.search(key_BTH[label_BT >= 0].float().cpu().numpy(), neighbours)
        log_prob_N = logits_NV.gather(1, label_N[:, None])[:, 0] - normaliser_N
        hit_NK = found.token_NK == label_N.cpu()[:, None]
        parts.append((log_prob_N.cpu(), normaliser_N.cpu(), found.similarity_NK, hit_NK))
    log_prob_N, normaliser_N, similarity_NK, hit_NK = (torch.cat(column) for column in zip(*parts))
    return Heard(log_prob_N, normaliser_N, similarity_NK, hit_NK, model.hidden_size)


def nll(heard: Heard, mixing: Mixing) -> float:
    """Mean -log P of the targets, nats."""
    sums = log_sums(heard.similarity_NK, heard.hit_NK, [heard.hit_NK.shape[1]], [mixing.theta(heard.hidden)])
    all_N, hit_N = sums.at(0, 0)
    if mixing.system == "trime":
        return -float(joint(heard.log_prob_N, heard.log_normaliser_N, all_N, hit_N).double().mean())
    return -float(linear(heard.log_prob_N, all_N, hit_N, mixing.weight).double().mean())


def calibrate(heard: Heard, mixing: Mixing, temperatures: Sequence[float], weights: Sequence[float]) -> Mixing:
    """The best temperature (and weight, where the system has one)."""
    tried = [
        replace(mixing, temperature=t, weight=w)
        for t in temperatures
        for w in (weights if mixing.system == "knn" else (0.0,))
    ]
    return tried[0] if len(tried) == 1 else min(tried, key=lambda one: nll(heard, one))
