"""Autoscaling of PLM replicas by their reports: Serve cannot count sessions between two steps."""

from __future__ import annotations

import math
from typing import Any


class ByLoad:
    """As many replicas as the live sessions need, at `target_ongoing_requests` each, or the waiting tokens, if more.

    Args:
        tokens_per_replica: waiting tokens of prompts and extractions.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas.

        Args:
            context: Serve's `AutoscalingContext`; replicas report `live_sessions` and `waiting_tokens`
                (`PLMEngine.record_autoscaling_stats`).
        """
        reported = context.aggregated_metrics or {}
        sessions, tokens = (sum(reported.get(name, {}).values()) for name in ("live_sessions", "waiting_tokens"))
        needed = math.ceil(max(sessions / context.config.target_ongoing_requests, tokens / self._tokens_per_replica))
        return min(max(needed, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}
