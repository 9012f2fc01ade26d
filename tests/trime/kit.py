"""Tiny models, keys and parts that the tests of evaluation share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pema_ray.memory.codec import Keys
from pema_ray.memory.search.nearest import DatastorePart, SearchOptions
from pema_ray.trime.config import DecoderShape
from pema_ray.trime.model.decoder import DecoderLM

VOCABULARY, HIDDEN = 23, 16


def tiny_model(adaptive: bool = False, max_positions: int = 96, seed: int = 0) -> DecoderLM:
    """Two layers of random weights, large enough that contexts differ."""
    torch.manual_seed(seed)
    cutoffs = (7, 15) if adaptive else None
    shape = DecoderShape(layers=2, hidden_size=HIDDEN, ffn_size=32, heads=2, cutoffs=cutoffs, dropout=0)
    model = DecoderLM(shape, VOCABULARY, max_positions).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def keys_of(count: int, hidden: int = HIDDEN, seed: int = 0, integers: bool = False) -> tuple[Tensor, Tensor]:
    """Random keys `[M, H]` and tokens `[M]`; `integers` make many similarities equal."""
    torch.manual_seed(seed)
    key_MH = torch.randint(-2, 3, (count, hidden)).float() if integers else torch.randn(count, hidden)
    return key_MH, torch.randint(0, VOCABULARY, (count,))


def part_of(key_MH: Tensor, token_M: Tensor, first_row: int = 0, **options) -> DatastorePart:
    """A part that compares with every key."""
    return DatastorePart(Keys("float32", key_MH.numpy()), np.asarray(token_M), first_row, SearchOptions(**options))
