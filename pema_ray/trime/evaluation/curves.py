"""Dev perplexity against memory size, k and the weights, from one pass's statistics. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pema_ray.trime.evaluation.calibration import Mixture, calibrate, nll
from pema_ray.trime.evaluation.results import Curve
from pema_ray.trime.evaluation.statistics import Probe, Statistics
from pema_ray.trime.evaluation.systems import EvaluationSystem

_WEIGHTS = tuple(step / 20 for step in range(20))


def curves_of(dev: Statistics, probe: Probe, systems: Sequence[EvaluationSystem], datastore: str | None) -> list[Curve]:
    """Every curve that the systems of a pass have.

    Args:
        datastore: the name of the searched one; None: systems that need one have no curves.
    """
    curves: list[Curve] = []
    measured = [system for system in systems if datastore is not None or not system.mixture.external]
    for system in measured if len(probe.sizes) > 1 else ():
        if system.mixture.size > 0:
            points = [(size, _best(dev, probe, replace(system.mixture, size=size))) for size in probe.sizes]
            curves.append(_curve("Perplexity against memory size", "entries of long memory", system, points))
    for system in measured if len(probe.neighbours) > 1 else ():
        if system.mixture.external:
            points = [(k, _best(dev, probe, replace(system.mixture, neighbours=k))) for k in probe.neighbours]
            curves.append(_curve("Perplexity against k", "neighbours", system, points))
    weighted = [system for system in measured if system.mixture.rule == "li" or system.mixture.second]
    return curves + [_over_weight(dev, probe, system) for system in weighted]


def _best(dev: Statistics, probe: Probe, mixture: Mixture) -> float:
    return math.exp(calibrate(dev, probe, mixture).nll)


def _over_weight(dev: Statistics, probe: Probe, system: EvaluationSystem) -> Curve:
    """Against lmbda of the second interpolation, or λ of `li`; all else as calibrated."""
    settings = calibrate(dev, probe, system.mixture).settings
    name = "second_weight" if system.mixture.second else "weight"
    points = [(w, math.exp(nll(dev, probe, system.mixture, replace(settings, **{name: w})))) for w in _WEIGHTS]
    return _curve("Perplexity against λ", "weight of the memory's distribution", system, points)


def _curve(title: str, x_label: str, system: EvaluationSystem, points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(title=title, x_label=x_label, name=system.name, points=tuple(points))
