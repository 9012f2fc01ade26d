"""A `PLMClient` that waits: for quota, for capacity, for a service that restarts.

It repeats temporary failures alone: `Busy` after its `retry_after`, `ConnectionError` after growing pauses, and a lost
prefix after putting it again. Any other error, such as a revoked key or another PLM, ends the call at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from pema_ray.errors import UserError
from pema_ray.line.lm_head import LMHeadBundle
from pema_ray.line.messages import ExtractBatch
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import Busy, Description, PLMClient, PrefixLost, Step, Stepped, adaptable

T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds; the pause doubles with every failed connection
_SHORTEST_PAUSE = 0.05  # seconds, whatever `retry_after` says: never a tight loop


class PatientPLM:
    """Repeats each call of a client until it succeeds, or has failed for too long.

    Args:
        patience_seconds: how long calls may fail while none succeeds.
        on_wait: gets what a call waits for and how long, and "" once no call waits.

    Raises (every call):
        UserError: only a person can fix it, or `patience_seconds` have passed.
    """

    def __init__(
        self, client: PLMClient, patience_seconds: float, on_wait: Callable[[str], None] = lambda text: None
    ) -> None:
        self.client, self.patience_seconds, self._on_wait = client, patience_seconds, on_wait
        self._waiting, self._last_success = 0, -math.inf
        self._prefix: Prefix | None = None  # the last one that was put

    async def describe(self) -> Description:
        return await self._repeated(self.client.describe)

    async def lm_head(self) -> LMHeadBundle:
        return await self._repeated(self.client.lm_head)

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        return await self._repeated(lambda: self.client.extract(batch), batch.handle)

    async def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        return await self._repeated(lambda: adaptable(self.client).read_prefix(token_ids))

    async def put_prefix(self, prefix: Prefix) -> None:
        self._prefix = prefix
        await self._repeated(lambda: adaptable(self.client).put_prefix(prefix))

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        return await self._repeated(lambda: adaptable(self.client).gradient(batch, d_state_NH), batch.handle)

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        """As `PLMClient.step`; repeats steps whose message was lost, and busy ones that wait."""
        outcomes: list[Stepped | Exception] = await self._repeated(lambda: self.client.step(steps))
        started = time.monotonic()
        pauses = _Pauses()
        while failed := {n: error for n, o in enumerate(outcomes) if (error := _temporary(o, steps[n]))}:
            await self._wait(max(failed.values(), key=lambda e: getattr(e, "retry_after", 0.0)), pauses, started)
            again = [steps[n] for n in failed]
            repeated = await self._repeated(lambda again=again: self.client.step(again))
            for number, outcome in zip(failed, repeated, strict=True):
                outcomes[number] = outcome
        return outcomes

    async def close(self, sessions: Sequence[str]) -> None:
        """Once, without waiting: the PLM owner forgets idle sessions by itself."""
        with suppress(Busy, ConnectionError):
            await self.client.close(sessions)

    async def end(self) -> None:
        await self.client.end()

    async def _repeated(self, call: Callable[[], Awaitable[T]], handle: str = "") -> T:
        """What the call returns in the end; if it is told that the prefix of `handle` is lost, that is put again."""
        started, pauses = time.monotonic(), _Pauses()
        lost = False
        while True:
            try:
                if lost and self._prefix is not None:
                    await adaptable(self.client).put_prefix(self._prefix)
                    lost = False
                answer = await call()
            except PrefixLost:
                if self._prefix is None or self._prefix.handle != handle:
                    raise
                lost = True
                await self._wait(Busy("it has lost the prefix", _SHORTEST_PAUSE), pauses, started)
            except (Busy, ConnectionError) as error:
                await self._wait(error, pauses, started)
            else:
                if not (isinstance(answer, list) and all(isinstance(outcome, Exception) for outcome in answer)):
                    self._last_success = time.monotonic()
                return answer

    async def _wait(self, error: Exception, pauses: _Pauses, started: float) -> None:
        seconds = pauses.after(error)
        if time.monotonic() + seconds - max(started, self._last_success) > self.patience_seconds:
            raise UserError(
                f"The PLM owner did not answer for {self.patience_seconds:g} s: {_reason(error)}. "
                "Start again when it does; what is finished is kept."
            ) from error
        self._waiting += 1
        self._on_wait(f"waiting for the PLM owner: {_reason(error)}, {max(1, round(seconds))} s")
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._on_wait("")


class _Pauses:
    """How long to wait after each failure of one call."""

    def __init__(self) -> None:
        self._next = _FIRST_PAUSE

    def after(self, error: Exception) -> float:
        if isinstance(error, Busy):
            return max(_SHORTEST_PAUSE, error.retry_after)
        pause, self._next = self._next, min(_LONGEST_PAUSE, 2 * self._next)
        return pause


def _temporary(outcome: Stepped | Exception, step: Step) -> Exception | None:
    if isinstance(outcome, ConnectionError) or (isinstance(outcome, Busy) and step.waits):
        return outcome
    return None


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
