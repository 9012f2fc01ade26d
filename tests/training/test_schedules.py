"""Learning rates by hand, and what holds for all of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.training.schedules import learning_rate

NAMES = ("constant", "cosine", "inverse_sqrt", "polynomial")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 3: 2.0, 4: 2.0, 12: 2.0}),
        ("cosine", {0: 0.5, 3: 2.0, 4: 2.0, 6: 1.75, 8: 1.0, 10: 0.25, 12: 0.0}),
        ("inverse_sqrt", {1: 1.0, 3: 2.0, 8: 4 / 3, 15: 1.0, 399: 0.2}),
        ("polynomial", {2: 1.5, 4: 2.0, 6: 1.5, 8: 1.0, 10: 0.5, 12: 0.0}),
    ],
)  # warm-up in 4 of 12 steps, to 2
def test_rates_by_hand(schedule, expected):
    if schedule == "cosine":
        expected = expected | {6: 1 + math.cos(math.pi / 4), 10: 1 - math.cos(math.pi / 4)}
    for step, rate in expected.items():
        found = learning_rate(step, schedule, 2.0, total_steps=12, warm_up_steps=4)
        assert found == pytest.approx(rate, abs=1e-12), step


def test_published_rates():
    """TRIME: to 1.0 in 16k steps, cosine over 270k to 1e-4; inverse root of 5e-4, 8k. PlugLM: a line to zero."""
    cosine = partial(learning_rate, schedule="cosine", peak=1.0, total_steps=286_000, warm_up_steps=16_000, last=1e-4)
    assert cosine(15_999) == 1.0
    assert cosine(151_000) == pytest.approx(0.50005)
    assert cosine(286_000) == pytest.approx(1e-4)
    root = partial(learning_rate, schedule="inverse_sqrt", peak=5e-4, total_steps=200_000, warm_up_steps=8_000)
    assert root(7_999) == 5e-4 and root(31_999) == pytest.approx(2.5e-4)
    line = partial(learning_rate, schedule="polynomial", peak=6e-3, total_steps=8_000, warm_up_steps=2_274)
    assert line(7_999) == pytest.approx(6e-3 / 5_726)
    assert line(8_000) == line(9_000) == 0.0
    assert learning_rate(5, "polynomial", 1.0, total_steps=10, power=2, last=0.2) == pytest.approx(0.4)


@given(
    st.sampled_from(NAMES), st.integers(0, 500), st.integers(1, 300), st.integers(0, 300), st.floats(1e-6, 10),
    st.floats(0, 1),
)  # fmt: skip
def test_rates_are_numbers_between_zero_and_the_peak_and_fall_after_the_warm_up(name, step, total, warm_up, peak, low):
    def rate(at: int) -> float:
        return learning_rate(at, name, peak, total_steps=total, warm_up_steps=warm_up, last=low * peak)

    assert 0 <= rate(step) <= peak * (1 + 1e-12)
    if step + 1 < warm_up:
        assert rate(step) < rate(step + 1)
    elif step >= warm_up:
        assert rate(step + 1) <= rate(step) * (1 + 1e-12)
