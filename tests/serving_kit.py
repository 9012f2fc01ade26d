"""A PLM owner's replicas without Ray: what a Serve handle does, on this event loop, with faults at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from pema_ray.plm_owner.service.deployment import PLMEngine


class DirectHandle:
    """Calls replicas as a `DeploymentHandle` would; `before` is told every call and may fail it.

    Args:
        make: makes a replica; they are named r0, r1, …

    Attributes:
        wire_seconds: between a replica's answer and its caller.
        loses_answers: what is on its way when the call is cancelled never comes.
    """

    def __init__(self, make: Callable[[], PLMEngine], replicas: int = 1) -> None:
        self._make, self._made = make, 0
        self.replicas: dict[str, PLMEngine] = {}
        self._turn = 0
        self.wire_seconds, self.loses_answers = 0.0, False
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

    def broadcast(self, method: str, *args: Any) -> _Broadcast:
        self.calls.append((method, None))
        return _Broadcast([getattr(replica, method)(*args) for replica in self.replicas.values()])

    def options(self, session_id: str) -> _Bound:
        return _Bound(self, session_id.partition("/")[0])

    def __getattr__(self, method: str) -> Any:
        return getattr(_Bound(self, None), method)


class _Broadcast:
    def __init__(self, calls: list[Any]) -> None:
        self._calls = calls

    async def results_async(self, return_exceptions: bool) -> list[Any]:
        return await asyncio.gather(*self._calls, return_exceptions=return_exceptions)


class _Bound:
    def __init__(self, handle: DirectHandle, home: str | None) -> None:
        self._handle, self._home = handle, home

    def __getattr__(self, method: str) -> Any:
        return _Method(self._handle, self._home, method)


class _Method:
    def __init__(self, handle: DirectHandle, home: str | None, method: str) -> None:
        self._handle, self._home, self._method = handle, home, method

    def remote(self, *args: Any) -> _Response:
        handle = self._handle
        handle.calls.append((self._method, self._home))
        return _Response(handle, self._method, self._home, args)


class _Response:
    """What a call gives: it goes on while nobody waits for it, until it is cancelled or answered."""

    def __init__(self, handle: DirectHandle, method: str, home: str | None, args: tuple[Any, ...]) -> None:
        self._work: asyncio.Future[Any] | None = None
        self._cancelled = False
        self._task = asyncio.ensure_future(self._answer(handle, method, home, args))

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        """What the replica has answered by now is answered, unless the handle loses answers."""
        self._cancelled = True
        if self._work is not None:
            self._work.cancel()

    async def _answer(self, handle: DirectHandle, method: str, home: str | None, args: tuple[Any, ...]) -> Any:
        handle.before(method)
        if not handle.replicas:
            raise DeploymentUnavailableError("no replica")
        if self._cancelled:
            raise RequestCancelledError
        names = sorted(handle.replicas)
        handle._turn += 1
        name = home if home in handle.replicas else names[handle._turn % len(names)]
        self._work = work = asyncio.ensure_future(getattr(handle.replicas[name], method)(*args))
        while not work.done():
            await asyncio.wait([work], timeout=0.01)
            if name not in handle.replicas:
                raise DeploymentUnavailableError(f"{name} died")
        if work.cancelled():
            raise RequestCancelledError
        await asyncio.sleep(handle.wire_seconds)
        if self._cancelled and handle.loses_answers:
            raise RequestCancelledError
        return work.result()
