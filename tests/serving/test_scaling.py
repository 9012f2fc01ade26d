"""Replicas follow live sessions and waiting tokens, whichever need more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pema_ray.plm_owner.service.autoscaling import ByLoad


@pytest.mark.parametrize(
    ("sessions", "tokens", "expected"),
    [
        ([], [], 1),
        ([3, 0], [0, 0], 1),
        ([16, 1], [0, 0], 2),
        ([10, 10, 20], [0, 0, 0], 3),
        ([400], [0], 5),
        ([0], [1000], 1),
        ([0, 0], [900, 101], 2),
        ([17], [3500], 4),
        ([50], [1500], 4),
        ([0], [10**9], 5),
    ],
)
def test_replicas_follow_the_larger_of_sessions_and_tokens(sessions, tokens, expected):
    reported = {"live_sessions": sessions, "waiting_tokens": tokens}
    context = SimpleNamespace(
        aggregated_metrics={name: dict(enumerate(map(float, values))) for name, values in reported.items()}
        if sessions
        else None,
        config=SimpleNamespace(target_ongoing_requests=16),
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=5,
    )
    assert ByLoad(tokens_per_replica=1000)(context) == (expected, {})
