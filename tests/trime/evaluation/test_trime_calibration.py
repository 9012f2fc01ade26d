"""Calibration finds, from one pass's statistics, what a search that computes everything anew would find."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.memory.search.nearest import OnePieceSearch
from pema_ray.trime.evaluation.calibration import Mixture, Settings, calibrate, golden_section, nll, token_log_probs
from pema_ray.trime.evaluation.statistics import Probe, Statistics, Text, measure
from tests.trime.kit import VOCABULARY, keys_of, part_of, tiny_model

PROBE = Probe(
    tokens_per_sample=16, context_window=8, sizes=(0, 32), taus=(0.5, 1.0, 2.0), neighbours=(4, 16),
    interp_temps=(2.0, 6.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> Statistics:
    model = tiny_model()
    torch.manual_seed(3)
    # A text that repeats itself, so that memories have something to give.
    token_N = torch.cat([torch.randint(0, VOCABULARY, (20,)).repeat(6), torch.randint(0, VOCABULARY, (40,))])
    return measure(model, Text(token_N), PROBE, OnePieceSearch([part_of(*keys_of(80))]))


@given(st.floats(0, 1), st.floats(0.2, 5))
def test_golden_section_finds_the_lowest_point(lowest: float, steep: float):
    minimum = golden_section(lambda x: steep * (x - lowest) ** 2)
    assert minimum == pytest.approx(lowest, abs=2e-3)


def test_golden_section_bears_infinity_at_an_end():
    assert golden_section(lambda x: math.inf if x == 1 else -x) > 0.99
    assert golden_section(lambda x: x) == 0.0


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture("none"), Mixture("gn"), Mixture("gn", 32), Mixture("li", 32),
        Mixture("none", second=True, neighbours=4),
        Mixture("gn", 32, joined=True, second=True, neighbours=16), Mixture("li", 32, second=True, neighbours=16),
    ],
)  # fmt: skip
def test_no_setting_of_a_fine_grid_is_better(mixture: Mixture, measured: Statistics):
    calibrated = calibrate(measured, PROBE, mixture)
    assert nll(measured, PROBE, mixture, calibrated.settings) == pytest.approx(calibrated.nll)
    weights = [n / 20 for n in range(20)]
    for tau in PROBE.taus:
        for temp in PROBE.interp_temps:
            for weight in weights if mixture.rule == "li" else [0.0]:
                for second in weights if mixture.second else [0.0]:
                    tried = nll(measured, PROBE, mixture, Settings(tau, weight, temp, second))
                    assert calibrated.nll <= tried + 1e-5


def test_a_mixture_is_never_worse_than_what_it_mixes(measured: Statistics):
    plain = calibrate(measured, PROBE, Mixture("none")).nll
    cache = calibrate(measured, PROBE, Mixture("li", 32)).nll
    with_knn = calibrate(measured, PROBE, Mixture("li", 32, second=True, neighbours=16)).nll
    assert with_knn <= cache + 1e-6 <= plain + 2e-6
    assert cache < plain - 0.1  # the text repeats itself


def test_statistics_suffice_without_the_model(measured: Statistics):
    """Statistics alone give the probability of every token."""
    log_p = token_log_probs(measured, PROBE, Mixture("gn", 32), Settings(tau=1.0))
    assert log_p.shape == (len(measured),)
    assert bool((log_p <= 1e-9).all())


def test_a_long_text_is_calibrated_as_a_short_one(measured: Statistics, monkeypatch):
    """Thirty times the same tokens have the best settings of one time, found by way of a shortlist."""
    monkeypatch.setattr("pema_ray.trime.evaluation.calibration._SHORTLIST", 2)
    long = Statistics.concatenate([measured] * 30)
    for mixture in (Mixture("gn", 32), Mixture("li", 32, second=True, neighbours=16)):
        once, often = (calibrate(statistics, PROBE, mixture) for statistics in (measured, long))
        assert often.nll == pytest.approx(once.nll, abs=1e-4)
        assert often.settings.tau == once.settings.tau
