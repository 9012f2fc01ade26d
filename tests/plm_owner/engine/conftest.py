from __future__ import annotations

import pytest
from batcher_kit import Clock

from pema_ray.plm_owner.engine import Batcher, EngineConfig
from pema_ray.plm_owner.model.export import export_lm_head


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batcher_of(tiny_plm, clock):
    def make(architecture: str = "llama", **settings) -> Batcher:
        plm = tiny_plm(architecture)
        return Batcher(plm, export_lm_head(plm).head, EngineConfig(**settings), clock)

    return make
