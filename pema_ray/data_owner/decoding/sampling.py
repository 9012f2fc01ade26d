"""Chooses the next token from a distribution. N rows, V vocabulary."""

from __future__ import annotations

import numpy as np
import torch

from pema_ray.data_owner.decoding.request import SamplingParams


def draw(log_p_V: torch.Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """A token drawn by temperature from the nucleus `top_p`: the smallest set of likeliest tokens with that mass."""
    scaled = (log_p_V / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, place = scaled.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # keeps the token that crosses top_p
        scaled = torch.zeros_like(scaled).scatter(-1, place, ordered)
    return int(torch.multinomial(scaled.cpu(), 1, generator=generator))


def random_stream(seed: int, stream: int) -> torch.Generator:
    """The random draws of one answer, named by a seed and a number."""
    mixed = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def top_tokens(log_p_V: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens and their log-probabilities."""
    if not count:
        return []
    values, places = log_p_V.topk(min(count, len(log_p_V)))
    return list(zip(places.tolist(), values.tolist(), strict=True))
