"""Systems of evaluation, by the names in tables: which memories a model sees, and how they are mixed in.

Knows the configuration alone; each name means a `calibration.Mixture`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pema_ray.trime.config import SYSTEM_NAMES, MemoryKind, TrimeConfig, TrimeEvaluateConfig
from pema_ray.trime.evaluation.calibration import Mixture
from pema_ray.trime.evaluation.statistics import Probe, Vectors

# τ of a plain language model's continuous cache, over final states, which are larger than keys
_CACHE_TAUS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2, 4.0, 6.0)
_DEFAULTS: dict[MemoryKind, tuple[str, ...]] = {
    "none": ("plain", "cache_local", "cache", "knn", "knn_cache"),
    "local": ("local", "long", "long_knn"),
    "long": ("local", "long", "long_knn"),
    "ext": ("local", "long", "ext", "long_knn", "ext_knn"),
}
_LABELS = {
    "plain": "vocabulary alone",
    "cache_local": "+ cache, local",
    "cache": "+ cache, {size:,}",
    "knn": "+ kNN-LM, k = {k}",
    "knn_cache": "+ kNN-LM + cache, {size:,}",
    "local": "local memory",
    "long": "local + long memory, {size:,}",
    "ext": "local + long + external memory, k = {k}",
    "local_knn": "local memory, + kNN",
    "long_knn": "local + long memory, {size:,}, + kNN, k = {k}",
    "ext_knn": "local + long + external memory, + kNN, k = {k}",
}
# Multiples of √H (inner product of keys) or of H (squared distance).
_INTERP_TEMPS = (0.008, 0.014, 0.025, 0.05, 0.08, 0.12, 0.18, 0.25, 0.33, 0.45, 0.6, 0.8, 1.1, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class EvaluationSystem:
    """One row of a table."""

    name: str
    label: str
    vectors: Vectors | None
    """What its local and long memory compare; None: it has none, and any pass measures it."""
    mixture: Mixture


def names_of(config: TrimeConfig) -> tuple[str, ...]:
    """The systems that are evaluated."""
    return config.evaluate.systems or _DEFAULTS[config.train.memory]


def needs_datastore(config: TrimeConfig) -> bool:
    return any(make_system(name, config.evaluate).mixture.external for name in names_of(config))


def make_system(name: str, config: TrimeEvaluateConfig) -> EvaluationSystem:
    assert name in SYSTEM_NAMES
    size = config.mem_size
    second = "knn" in name
    cached = {"cache_local": 0, "cache": size, "knn_cache": size}
    if name in ("plain", "knn"):
        mixture, vectors = Mixture("none", second=second, neighbours=config.neighbours), None
    elif name in cached:
        mixture, vectors = Mixture("li", cached[name], second=second, neighbours=config.neighbours), "state"
    else:
        long = 0 if name.startswith("local") else size
        mixture, vectors = Mixture("gn", long, name.startswith("ext"), second, config.neighbours), "key"
    return EvaluationSystem(name, _LABELS[name].format(size=size, k=config.neighbours), vectors, mixture)


def window_of(config: TrimeConfig) -> tuple[int, int]:
    """Tokens of a window, and those of them that are context only."""
    c = config.evaluate
    length = c.tokens_per_sample or config.batches.segment
    return length, length // 2 if c.context_window is None else c.context_window


def make_probe(config: TrimeConfig, vectors: Vectors, hidden_size: int) -> Probe:
    """What one pass measures for all systems over these vectors: to calibrate and to plot them."""
    c = config.evaluate
    length, context = window_of(config)
    scale = hidden_size if config.index.metric == "l2" else math.sqrt(hidden_size)
    return Probe(
        tokens_per_sample=length,
        context_window=context,
        batch_windows=c.batch_windows,
        sizes=tuple(sorted({0, c.mem_size, *c.mem_sizes})),
        taus=c.taus if vectors == "key" else _CACHE_TAUS,
        neighbours=tuple(sorted({c.neighbours, *c.neighbour_counts})),
        interp_temps=c.interp_temps or tuple(round(scale * factor, 6) for factor in _INTERP_TEMPS),
        vectors=vectors,
        reset_at_documents=c.reset_at_documents,
        count_context_twice=c.count_context_twice,
    )
