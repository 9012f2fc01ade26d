"""Gradual Unrolling: λ falls as published, every sequence by its own length, and a mixture is a distribution."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pema_ray.data_owner.config import ScheduleKind
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix
from pema_ray.errors import UserError

PROBABILITY = st.floats(0, 1)
KINDS = st.sampled_from(get_args(ScheduleKind))


@pytest.mark.parametrize(
    ("length", "floor", "golden"),
    [
        (5, 0.0, [0.9, 0.5184, 0.2916, 0.1296, 0.0324]),
        (8, 0.25, [0.9, 0.7151, 0.5917, 0.4873, 0.4019, 0.3354, 0.2880, 0.2595]),
    ],
)
def test_the_published_values(length: int, floor: float, golden: list[float]):
    schedule = UnrollingSchedule(0.9, "quadratic", floor)
    assert [round(schedule.at(t, length), 4) for t in range(length)] == golden


def test_linear_falls_by_equal_steps_to_the_floor():
    assert [round(UnrollingSchedule(0.8, "linear").at(t, 4), 4) for t in range(6)] == [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]
    assert UnrollingSchedule(0.8, "linear").at(1, 0) == UnrollingSchedule(0.8, "linear").at(1, 1) == 0.0
    floored = UnrollingSchedule(0.8, "linear", 0.5)
    assert [round(floored.at(t, 4), 4) for t in range(1, 6)] == [0.8, 0.7, 0.6, 0.5, 0.5]


def test_constant_stays_whatever_the_length_and_floor():
    assert {UnrollingSchedule(0.7, "constant", 0.2).at(t, length) for t in range(9) for length in (1, 5)} == {0.7}


@given(top=PROBABILITY, floor=PROBABILITY, kind=KINDS, length=st.integers(1, 40))
def test_lambda_starts_at_the_top_is_a_probability_and_never_rises(top, floor, kind, length):
    assume(kind == "constant" or floor <= top)
    schedule = UnrollingSchedule(top, kind, floor)
    values = [schedule.at(t, length) for t in range(2 * length + 2)]
    assert values[0] == top
    assert all(0 <= value <= 1 for value in values)
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] == (top if kind == "constant" else floor)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.inf, math.nan])
def test_lambda_and_floor_outside_0_1_are_refused(wrong: float):
    with pytest.raises(UserError, match=rf"generate.lambda_max={wrong}: λ must lie in \[0, 1\]"):
        UnrollingSchedule(wrong)
    with pytest.raises(UserError, match="generate.floor"):
        UnrollingSchedule(0.5, "linear", wrong)


@given(lam=st.lists(PROBABILITY, min_size=1, max_size=4), seed=st.integers(0, 99), spread=st.floats(0.1, 60))
def test_a_mixture_sums_to_one_and_is_the_weighted_mean(lam: list[float], seed: int, spread: float):
    draw = torch.Generator().manual_seed(seed)
    pema, plm = (spread * torch.randn(2, len(lam), 30, generator=draw)).log_softmax(-1)
    weights = torch.tensor(lam)
    mixed = mix(pema, plm, weights)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(len(lam)))
    expected = weights[:, None] * pema.exp() + (1 - weights[:, None]) * plm.exp()
    torch.testing.assert_close(mixed.exp(), expected, atol=1e-6, rtol=1e-5)


def test_lambda_0_is_exactly_the_plm_and_lambda_1_exactly_pema_in_one_batch():
    torch.manual_seed(0)
    pema, plm = (20 * torch.randn(2, 2, 50)).log_softmax(-1)
    mixed = mix(pema, plm, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], plm[0]) and torch.equal(mixed[1], pema[1])
    impossible = torch.full((2, 50), -math.inf)
    assert torch.equal(mix(impossible, plm, torch.zeros(2)), plm)


def test_a_token_that_only_one_of_the_two_allows_keeps_its_part():
    pema, plm = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.5, 0.5]]).log()
    torch.testing.assert_close(mix(pema, plm, torch.tensor([0.4])).exp(), torch.tensor([[0.2, 0.5, 0.3]]))


def test_a_floor_above_the_top_is_refused():
    with pytest.raises(UserError, match="λ would rise"):
        UnrollingSchedule(0.3, "linear", 0.5)
