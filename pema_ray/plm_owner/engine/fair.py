"""Start-time fair queueing (Goyal, Vin, Cheng 1996): gives all waiting flows equal shares of passes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


class FairQueue:
    """Shares passes among flows by the positions that were computed for each.

    No flow gets more than one pass ahead of a waiting one, however much it has queued. A flow that has been idle has no
    claim to past passes.
    """

    def __init__(self) -> None:
        self._virtual = 0
        self._finish: dict[Hashable, int] = {}

    def choose(self, waiting: Iterable[K]) -> K:
        """The flow to serve next; the first of equals."""
        flow = min(waiting, key=self._start)
        self._virtual = self._start(flow)
        self._finish = {key: finish for key, finish in self._finish.items() if finish > self._virtual}
        return flow

    def charge(self, flow: Hashable, positions: int) -> None:
        """Count the positions computed for the chosen flow."""
        self._finish[flow] = self._start(flow) + positions

    def _start(self, flow: Hashable) -> int:
        return max(self._virtual, self._finish.get(flow, 0))
