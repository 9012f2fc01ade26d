"""The replicas of a PLM owner in one cluster, called through a Serve handle: a `Stepper` that keeps sessions at home.

Bytes go in and come out as they would between organisations. A replica that dies takes its sessions with it: their
steps are `Busy`, then `SessionLost` at whichever replica is there, and the data owner says them again whole. A step
that its caller waits for no more is cancelled where it is; sessions that it has opened all the same are closed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, LMHeadBundle, ModelCard, SessionLost, codec
from pema_ray.line.stepping import Busy, Step, Stepped
from pema_ray.plm_owner.off_loop import off_loop

_TOKEN_BYTES = 4
_MOST_HOMES = 100_000


class Replicas:
    """Sessions over a deployment of `PLMEngine`.

    Args:
        handle: of the deployment.
        owner: whose sessions these are; caches of different owners never meet.
    """

    def __init__(self, handle: Any, owner: str = "local") -> None:
        self._handle, self._owner = handle, owner
        self._homes: dict[str, str] = {}
        self._described: dict[str, Any] | None = None
        self._flying: Counter[str] = Counter()
        self._closed: set[str] = set()
        """Sessions to close as soon as it is known where they live."""
        self._answering: set[asyncio.Task[list[Stepped | Exception]]] = set()

    async def describe(self) -> ModelCard:
        return ModelCard.from_dict({k: v for k, v in (await self.limits()).items() if k != "max_session_tokens"})

    async def limits(self) -> dict[str, Any]:
        """The model card's entries, and `max_session_tokens`."""
        if self._described is None:
            self._described = await self._call(self._handle.describe)
        assert self._described is not None
        return self._described

    async def lm_head(self) -> LMHeadBundle:
        """The LM-head bundle."""
        return LMHeadBundle.from_files(codec.decode_files(await self.lm_head_bytes()))

    async def lm_head_bytes(self) -> bytes:
        """The same, as the frame that crosses the line."""
        return await self._call(self._handle.lm_head)

    async def extract(self, batch: ExtractBatch) -> Any:
        """Representations `[N, H]` of a batch."""
        return codec.decode_rows(await self.extract_bytes(codec.encode_extract(batch)))

    async def extract_bytes(self, body: bytes) -> bytes:
        """The same, frame in and frame out."""
        return await self._call(self._handle.extract, self._owner, body)

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call any replica.

        Raises:
            UserError: what the replica refused, in its own words; Busy: it died, or there is none.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        response = method.remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except UserError as error:
            raise _own(error) from None
        except (RayError, RayServeException) as error:
            raise Busy(f"no replica of the PLM answers ({type(error).__name__})") from None

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        groups: dict[str, list[int]] = {}
        for number, step in enumerate(steps):
            home = self._homes.get(step.session)
            # a session without a home is opened by itself, so that Serve spreads openings over replicas
            groups.setdefault(home or f"?{step.session}", []).append(number)
        found: list[Stepped | Exception] = [SessionLost()] * len(steps)

        async def one(home: str, numbers: list[int]) -> None:
            chosen = [steps[number] for number in numbers]
            for number, outcome in zip(numbers, await self._at(home, chosen), strict=True):
                found[number] = outcome

        await asyncio.gather(*(one(home, numbers) for home, numbers in groups.items()))
        return found

    async def _at(self, home: str, steps: Sequence[Step]) -> list[Stepped | Exception]:
        handle = self._handle if home.startswith("?") else self._handle.options(session_id=f"{home}/")
        body = await off_loop(_TOKEN_BYTES * sum(len(step.tokens) for step in steps), codec.encode_steps, steps)
        self._flying.update(step.session for step in steps)
        # A task and a context of its own, which hears the answer even if the caller goes away: it alone tells where
        # sessions live. In the context of a request that has ended, Serve would cancel what is said afterwards as well.
        apart = Context()
        response = apart.run(handle.step.remote, self._owner, body)
        answering = asyncio.create_task(self._answered(response, steps), context=apart)
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            if not answering.done():
                self._closed.update(step.session for step in steps if step.session not in self._homes)
                response.cancel()
            raise

    async def _answered(self, response: Any, steps: Sequence[Step]) -> list[Stepped | Exception]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import BackPressureError, RayServeException

        names = [step.session for step in steps]
        replica: str | None = None
        outcomes: list[Stepped | Exception]
        try:
            replica, body = await response
            outcomes = await off_loop(len(body), codec.decode_stepped, body, UserError)
        except (BackPressureError, Busy) as error:
            outcomes = [Busy(str(error), getattr(error, "retry_after", 1.0))] * len(steps)
        except UserError as error:
            outcomes = [_own(error)] * len(steps)
        except (RayError, RayServeException) as error:  # the replica died, or is being replaced: ask another
            for name in names:
                self._homes.pop(name, None)
            outcomes = [Busy(f"no replica of the PLM answers ({type(error).__name__})", 0.1)] * len(steps)
        finally:
            self._flying.subtract(names)
            self._flying += Counter()  # without those that are at nought
            closed = self._closed.intersection(names)
            self._closed -= closed
        if replica is not None:
            for name, outcome in zip(names, outcomes, strict=True):
                if isinstance(outcome, Stepped):
                    self._homes[name] = replica
                    if len(self._homes) > _MOST_HOMES:  # sessions that nobody closed
                        del self._homes[next(iter(self._homes))]
                else:
                    self._homes.pop(name, None)
        if closed and replica is None:  # an answer that was on its way when the call was cancelled is lost
            await self._close_everywhere(sorted(closed))
        elif closed:  # while this was under way, nobody knew where they would live
            await self.close(sorted(closed))
        return outcomes

    async def close(self, sessions: Sequence[str]) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        groups: dict[str, list[str]] = {}
        for session in sessions:
            if home := self._homes.pop(session, None):
                groups.setdefault(home, []).append(session)
            elif self._flying[session]:
                self._closed.add(session)
        for home, names in groups.items():
            with suppress(RayError, RayServeException):  # with its replica a session is forgotten too
                await Context().run(self._handle.options(session_id=f"{home}/").close.remote, self._owner, names)

    async def _close_everywhere(self, sessions: list[str]) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        with suppress(RayError, RayServeException):
            told = Context().run(self._handle.broadcast, "close", self._owner, sessions)
            await told.results_async(return_exceptions=True)


def _own(error: Exception) -> Exception:
    """The error as the replica raised it: Ray's own words are a traceback."""
    return getattr(error, "cause", error)
