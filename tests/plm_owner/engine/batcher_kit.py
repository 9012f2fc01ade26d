"""Shared by tests of the batcher: a clock that they set, and loops that run passes until jobs are done."""

from __future__ import annotations

from typing import Any

from pema_ray.plm_owner.engine import Batcher
from pema_ray.plm_owner.engine.batcher import Job

CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def finish(batcher: Batcher, *jobs: Job) -> list[Any]:
    for _ in range(500):
        if all(job.result is not None for job in jobs):
            return [job.result for job in jobs]
        batcher.run()
    raise AssertionError("the jobs are never done")


def positions_until(batcher: Batcher, *jobs: Job) -> int:
    """Finish jobs; returns the positions of all passes."""
    positions = 0
    while any(job.result is None for job in jobs):
        batcher.run()
        positions += sum(count for _, count in batcher.passes)
    return positions
