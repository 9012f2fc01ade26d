"""A small LM head with every optional part, and rows whose targets depend on their keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pema_ray.line import LMHead, ModelCard
from pema_ray.line.lm_head import HeadSpec
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import encode

H, V = 16, 40


@pytest.fixture
def card() -> ModelCard:
    return ModelCard("tiny", "a" * 16, H, V, 96, (1,))


@pytest.fixture
def make_head() -> Callable[..., LMHead]:
    """Makes `softcap(scale · (W · rms_norm(f) + b))` of `[V, H]`, the same at every call."""

    def make(bias: bool = True, scale: float = 1.0, softcap: float | None = None, norm: str = "rms_norm") -> LMHead:
        draw = torch.Generator().manual_seed(3)
        tensors = {"weight": torch.randn(V, H, generator=draw), "norm_weight": 1 + torch.rand(H, generator=draw)}
        if bias:
            tensors["bias"] = torch.randn(V, generator=draw)
        if norm == "identity":
            del tensors["norm_weight"]
        return LMHead(HeadSpec(norm, 1e-5, scale, softcap), tensors)

    return make


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., MemoryRows]:
    """Makes rows `key [N, H]` whose target is one of eight tokens, given by the key's first three signs."""

    def make(count: int, seed: int, hidden: int = H) -> MemoryRows:
        key = np.random.default_rng(seed).normal(size=(count, hidden)).astype(np.float32)
        target = 3 + (key[:, :3] > 0) @ np.array([1, 2, 4])
        index = np.arange(count)
        return MemoryRows(
            encode(key, "float32"), target.astype(np.int32), index.astype(np.int64), np.zeros(count, np.int32)
        )

    return make
