"""Actors talk to the very PLM whose head was exported, or to none."""

from __future__ import annotations

import pytest

from pema_ray.config import PLMConfig
from pema_ray.errors import FingerprintMismatch
from pema_ray.stages.plm import connect, factory


def test_an_actor_refuses_a_plm_that_is_not_the_exported_one(tiny_plm_folder):
    mine, other = (PLMConfig(name=tiny_plm_folder("llama", seed), dtype="float32", device="cpu") for seed in (0, 1))
    card = connect(mine).describe()
    assert factory(mine, 1, card)().describe() == card
    with pytest.raises(FingerprintMismatch) as caught:
        factory(other, 1, card)()
    assert caught.value.expected == card.label
    assert caught.value.found == connect(other).describe().label
