"""Prometheus metrics of both owners' services, through Ray. Knows names, units and buckets; never a session or a text.

`docs/serving.md` lists them. Totals and levels are sampled from the services' own counters; values of histograms are
observed one by one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)
_EVERY = 2.0  # seconds between two samples
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
HISTOGRAMS: dict[str, tuple[str, list[float]]] = {
    "first_token_seconds": ("From a request to its first token", _SECONDS),
    "token_seconds": ("Between two tokens of an answer", _SECONDS),
    "lambda": ("Weight of the adapter in a token's mixture", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    "pass_sequences": ("Sequences of a forward pass", [float(size) for size in _SIZES]),
    "pass_tokens": ("Tokens of a forward pass", [float(size) for size in _SIZES]),
}


# Counters since the start, by service; `refused_<status>` beside them.
TOTALS = {
    "data_owner": {
        "requests": "Requests to the API, health checks apart",
        "tokens": "Tokens generated",
        "drafted": "Draft tokens",
        "accepted": "Draft tokens accepted",
        "round_trips": "Messages to the PLM owner",
        "received_rows": "Representations from the PLM owner",
        "replays": "Lost sessions that were replayed",
        "busy": "Steps that the PLM owner answered as busy",
    },
    "plm_owner": {
        "passes": "Forward passes",
        "tokens": "Tokens of forward passes",
        "steps": "Steps taken",
        "steps_not_taken": "Steps answered by an error: lost, busy, too long",
        "extractions": "Extractions answered",
        "extractions_not_taken": "Extractions answered by an error: busy, too long",
    },
    "plm_owner_api": {
        "requests": "Requests of data owners",
        "rows": "Representations requested",
        "tokens": "Tokens sent up",
        "sessions": "Sessions named in requests",
        "received_bytes": "Bytes of requests' bodies",
        "sent_bytes": "Bytes of answers",
    },
}
LEVELS = {
    "data_owner": {"live_answers": "Answers in progress"},
    "plm_owner": {
        "live_sessions": "Sessions that hold a slot",
        "waiting_steps": "Steps waiting to start",
        "waiting_tokens": "Tokens of prompts and extractions waiting to be computed",
        "cached_tokens": "Tokens of live sessions in the key-value cache",
        "slots": "Session slots",
    },
    "plm_owner_api": {},
}


class Metrics(Protocol):
    """Where a service reports its histograms."""

    def observe(self, name: str, value: float) -> None:
        """One value of a distribution that `HISTOGRAMS` names."""
        ...


class NoMetrics:
    """Discards every value."""

    def observe(self, name: str, value: float) -> None:
        pass


class RayMetrics:
    """Ray's own exporter, on every node's metrics port; names begin with `pema_<owner>_`."""

    def __init__(self, owner: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._prefix, self._totals, self._levels = f"pema_{owner}_", TOTALS[owner], LEVELS[owner]
        self._instruments: dict[str, Any] = {}
        self._last_totals: dict[str, float] = {}
        self._counter, self._gauge, self._histogram = Counter, Gauge, Histogram

    def observe(self, name: str, value: float) -> None:
        if name not in self._instruments:
            description, buckets = HISTOGRAMS[name]
            self._instruments[name] = self._histogram(self._prefix + name, description, buckets)
        self._instruments[name].observe(value)

    def sample(self, totals: Mapping[str, float], levels: Mapping[str, float]) -> None:
        """Report totals, which only grow, and levels, which rise and fall."""
        for name, total in list(totals.items()):  # a copy: the service's thread goes on counting
            if name not in self._instruments:
                self._instruments[name] = self._counter(f"{self._prefix}{name}_total", self._totals.get(name, name))
            if (increase := total - self._last_totals.get(name, 0.0)) > 0:
                self._instruments[name].inc(increase)
                self._last_totals[name] = total
        for name, level in levels.items():
            if name not in self._instruments:
                self._instruments[name] = self._gauge(self._prefix + name, self._levels.get(name, name))
            self._instruments[name].set(level)

    async def keep_sampling(self, read: Callable[[], tuple[Mapping[str, float], Mapping[str, float]]]) -> None:
        """Sample what `read` returns, for ever."""
        while True:
            try:
                self.sample(*read())
            except Exception:  # one failure must not end all later samples
                logger.exception("metrics could not be sampled")
            await asyncio.sleep(_EVERY)
