"""Autoscaling by live sessions: between two steps of a session nothing is going on that Serve itself could count."""

from __future__ import annotations

import math
from typing import Any


def by_live_sessions(context: Any) -> tuple[int, dict[str, Any]]:
    """As many replicas as hold the sessions that live or wait, at `target_ongoing_requests` each.

    Args:
        context: Serve's `AutoscalingContext`; replicas report `live_sessions` (`PLMEngine.record_autoscaling_stats`).
    """
    told = (context.aggregated_metrics or {}).get("live_sessions", {})
    wanted = math.ceil(sum(told.values()) / context.config.target_ongoing_requests)
    bounded = min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
    return bounded, {}
