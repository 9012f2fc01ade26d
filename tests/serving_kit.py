"""A PLM owner's replicas without Ray: what a Serve handle does, on this event loop, with faults at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError

from pema_ray.plm_owner.service import PLMEngine


class DirectHandle:
    """Calls replicas as a `DeploymentHandle` would; `before` is told every call and may fail it.

    Args:
        make: makes a replica; they are named r0, r1, …
    """

    def __init__(self, make: Callable[[], PLMEngine], replicas: int = 1) -> None:
        self._make, self._made = make, 0
        self.replicas: dict[str, PLMEngine] = {}
        self._turn = 0
        self.calls: list[tuple[str, str | None]] = []
        self.before: Callable[[str], None] = lambda method: None
        for _ in range(replicas):
            self.add()

    def add(self) -> str:
        """One replica more."""
        name = f"r{self._made}"
        self._made += 1
        replica = self._make()
        replica.replica = name
        self.replicas[name] = replica
        return name

    def kill(self, name: str) -> None:
        """A replica is gone, with all its sessions; steps that it had under way are never answered."""
        del self.replicas[name]

    def options(self, session_id: str) -> _Bound:
        return _Bound(self, session_id.partition("/")[0])

    def __getattr__(self, method: str) -> Any:
        return getattr(_Bound(self, None), method)


class _Bound:
    def __init__(self, handle: DirectHandle, home: str | None) -> None:
        self._handle, self._home = handle, home

    def __getattr__(self, method: str) -> Any:
        return _Method(self._handle, self._home, method)


class _Method:
    def __init__(self, handle: DirectHandle, home: str | None, method: str) -> None:
        self._handle, self._home, self._method = handle, home, method

    async def remote(self, *args: Any) -> Any:
        handle = self._handle
        handle.calls.append((self._method, self._home))
        handle.before(self._method)
        if not handle.replicas:
            raise DeploymentUnavailableError("no replica")
        names = sorted(handle.replicas)
        handle._turn += 1
        name = self._home if self._home in handle.replicas else names[handle._turn % len(names)]
        work = asyncio.ensure_future(getattr(handle.replicas[name], self._method)(*args))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=0.01)
                if name not in handle.replicas:
                    raise DeploymentUnavailableError(f"{name} died")
        except asyncio.CancelledError:  # Serve cancels what a caller does not wait for any more
            work.cancel()
            raise
        return work.result()
