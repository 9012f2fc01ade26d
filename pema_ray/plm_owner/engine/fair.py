"""Start-time fair queueing (Goyal, Vin, Cheng 1996): who gets the next pass, so that all who wait get equal shares."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


class FairQueue:
    """Shares passes among flows by the positions that were computed for each.

    A flow that waits is served before any other gets more than one pass ahead of it, however much the others have
    waiting; one that has been idle has no claim to passes of the past.
    """

    def __init__(self) -> None:
        self._virtual = 0
        self._finish: dict[Hashable, int] = {}

    def choose(self, waiting: Iterable[K]) -> K:
        """The flow that is served next; the first of those that are equal."""
        chosen = min(waiting, key=self._start)
        self._virtual = self._start(chosen)
        self._finish = {flow: finish for flow, finish in self._finish.items() if finish > self._virtual}
        return chosen

    def charge(self, flow: Hashable, positions: int) -> None:
        """Count what was computed for the flow that was chosen."""
        self._finish[flow] = self._start(flow) + positions

    def _start(self, flow: Hashable) -> int:
        return max(self._virtual, self._finish.get(flow, 0))
