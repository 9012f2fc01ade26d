"""Chooses τ, λ, interp_temp and lmbda on the dev split, from one pass's `Statistics`: the model does not run again.

Temperatures are those of the pass's grid; weights are found by golden section, which is exact because the loss of a
mixture is convex in them. Knows torch alone. N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pema_ray.trime.evaluation.combination import joint, linear
from pema_ray.trime.evaluation.statistics import Probe, Statistics

Rule = Literal["none", "gn", "li"]
_GOLDEN = (math.sqrt(5) - 1) / 2
_WEIGHT_ERROR, _RANK_ERROR = 1e-3, 0.03  # of a chosen weight; of one that only ranks temperatures
_RANK_TOKENS, _SHORTLIST = 2048, 6  # tokens that rank the grid's temperatures, and how many are tried on all tokens
_ROUNDS = 4  # of two weights in turns; the loss is flat to 1e-4 by then


@dataclass(frozen=True, slots=True)
class Mixture:
    """How the distributions are combined, before calibration.

    Attributes:
        rule: of the local and long memory (and the external one, if it is `joined`) with the vocabulary.
        size: entries of long memory.
        joined: the external memory's entries share the normaliser (`gn`).
        second: kNN-LM's interpolation with the external memory.
        neighbours: k.
    """

    rule: Rule
    size: int = 0
    joined: bool = False
    second: bool = False
    neighbours: int = 1024

    def __post_init__(self) -> None:
        assert not self.joined or self.rule == "gn"

    @property
    def external(self) -> bool:
        """Whether a datastore is needed."""
        return self.joined or self.second


@dataclass(frozen=True, slots=True)
class Settings:
    """What calibration chose; 1 and 0 where the mixture does not use it."""

    tau: float = 1.0
    weight: float = 0.0
    """λ of `li`."""
    interp_temp: float = 1.0
    second_weight: float = 0.0
    """lmbda, of the second interpolation."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    settings: Settings
    nll: float
    """Nats per token on the text it was chosen on."""


def token_log_probs(statistics: Statistics, probe: Probe, mixture: Mixture, settings: Settings) -> Tensor:
    """log P of every scored token `[N]`, float64.

    Args:
        settings: temperatures must be of the probe's grid.
    """
    first_N = _first(statistics, probe, mixture, settings.tau)(settings.weight)
    if not mixture.second:
        return first_N
    return linear(first_N, *_second(statistics, probe, mixture, settings.interp_temp), settings.second_weight)


def nll(statistics: Statistics, probe: Probe, mixture: Mixture, settings: Settings) -> float:
    """Nats per token."""
    return float(-token_log_probs(statistics, probe, mixture, settings).mean())


def calibrate(statistics: Statistics, probe: Probe, mixture: Mixture) -> Calibrated:
    """The settings with the lowest NLL: every temperature of the grid, each with its best weights.

    Of a long text, evenly spaced tokens rank the temperatures, and the best few are compared on all tokens.
    """
    taus = probe.taus if mixture.rule != "none" else probe.taus[:1]
    temps = probe.interp_temps if mixture.second else probe.interp_temps[:1]
    grid = [Settings(tau=tau, interp_temp=temp) for tau in taus for temp in temps]
    stride = len(statistics) // _RANK_TOKENS
    if stride > 1 and len(grid) > _SHORTLIST:
        grid = _ranked(statistics[::stride], probe, mixture, grid)[:_SHORTLIST]
    return min(
        (_weighed(statistics, probe, mixture, settings) for settings in grid), key=lambda calibrated: calibrated.nll
    )


def _ranked(statistics: Statistics, probe: Probe, mixture: Mixture, grid: list[Settings]) -> list[Settings]:
    """The grid's temperatures, the best first."""
    nlls = [_weighed(statistics, probe, mixture, settings, _RANK_ERROR).nll for settings in grid]
    return [grid[place] for place in sorted(range(len(grid)), key=nlls.__getitem__)]


def _weighed(
    statistics: Statistics, probe: Probe, mixture: Mixture, settings: Settings, error: float = _WEIGHT_ERROR
) -> Calibrated:
    """The best λ and lmbda at given temperatures."""
    first = _first(statistics, probe, mixture, settings.tau)
    second = _second(statistics, probe, mixture, settings.interp_temp) if mixture.second else None

    def loss(weight: float, second_weight: float) -> float:
        log_p_N = first(weight)
        return float(-(log_p_N if second is None else linear(log_p_N, *second, second_weight)).mean())

    weight, second_weight = (0.5 if mixture.rule == "li" else 0.0), (0.3 if mixture.second else 0.0)
    rounds = _ROUNDS if error == _WEIGHT_ERROR else 1
    for _ in range(rounds if mixture.rule == "li" and mixture.second else 1):
        if mixture.rule == "li":
            weight = golden_section(lambda w: loss(w, second_weight), error=error)  # noqa: B023  used at once
        if mixture.second:
            second_weight = golden_section(lambda w: loss(weight, w), error=error)  # noqa: B023
    return Calibrated(replace(settings, weight=weight, second_weight=second_weight), loss(weight, second_weight))


def _first(statistics: Statistics, probe: Probe, mixture: Mixture, tau: float) -> Callable[[float], Tensor]:
    """log P of vocabulary and near memories at τ, as a function of λ."""
    vocab_N, norm_N = statistics.log_vocab_N.double(), statistics.log_norm_N.double()
    if mixture.rule == "none":
        return lambda weight: vocab_N
    place = probe.taus.index(tau)
    all_N, hit_N = (part.double() for part in statistics.context.at(probe.sizes.index(mixture.size), place))
    if mixture.joined:
        assert statistics.external is not None
        more_all_N, more_hit_N = statistics.external.at(probe.neighbours.index(mixture.neighbours), place)
        all_N, hit_N = torch.logaddexp(all_N, more_all_N.double()), torch.logaddexp(hit_N, more_hit_N.double())
    if mixture.rule == "gn":
        log_p_N = joint(vocab_N, norm_N, all_N, hit_N)
        return lambda weight: log_p_N
    return lambda weight: linear(vocab_N, all_N, hit_N, weight)


def _second(statistics: Statistics, probe: Probe, mixture: Mixture, interp_temp: float) -> tuple[Tensor, Tensor]:
    assert statistics.second is not None
    k, temp = probe.neighbours.index(mixture.neighbours), probe.interp_temps.index(interp_temp)
    all_N, hit_N = statistics.second.at(k, temp)
    return all_N.double(), hit_N.double()


def golden_section(
    loss: Callable[[float], float], low: float = 0.0, high: float = 1.0, error: float = _WEIGHT_ERROR
) -> float:
    """Where a convex function of [low, high] is least, within `error`; the ends are tried too.

    At weight 1 the loss may be infinite: no memory entry has the token.
    """
    begin, end = low, high
    left, right = end - _GOLDEN * (end - begin), begin + _GOLDEN * (end - begin)
    at_left, at_right = loss(left), loss(right)
    while end - begin > error:
        if at_left <= at_right:
            end, right, at_right = right, left, at_left
            left = end - _GOLDEN * (end - begin)
            at_left = loss(left)
        else:
            begin, left, at_left = left, right, at_right
            right = begin + _GOLDEN * (end - begin)
            at_right = loss(right)
    return min((low, (begin + end) / 2, high), key=loss)
