"""The replicas of a PLM owner in one cluster, called through a Serve handle: a `PLMClient` with session affinity.

Requests and answers are the same frames as between organisations. A dead replica loses its sessions: their steps are
`Busy`, then `SessionLost` at another replica, and the data owner reopens them with all their ids. A step whose caller
disconnects is cancelled; sessions that it opened nevertheless are closed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, Description, ExtractBatch, LMHeadBundle, SessionLost, Step, Stepped, codec
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import PrefixLost
from pema_ray.plm_owner.service.executor import run_in_executor

_TOKEN_BYTES = 4
_MAX_SESSIONS = 100_000
_MAX_GRAPHS = 1000
_DEPLOYMENT = "PLMEngine"


class Replicas:
    """A client of a `PLMEngine` deployment.

    Args:
        handle: of the deployment.
        owner: whose sessions these are; caches of different owners never meet.
        fingerprint: of the PLM that must answer; by default that of the first `describe`.
        label: names the PLM owner in messages.
    """

    def __init__(
        self, handle: Any, owner: str = "local", fingerprint: str | None = None, label: str = "The PLM owner"
    ) -> None:
        self._handle, self._owner, self._fingerprint, self._label = handle, owner, fingerprint, label
        self._owner_replica: dict[str, str] = {}
        self._graph_replica: dict[str, str] = {}
        """Of every batch whose gradient is expected, by its key."""
        self._description: Description | None = None
        self._in_flight: Counter[str] = Counter()
        self._closed: set[str] = set()
        """Sessions to close once it is known which replica holds them."""
        self._answering: set[asyncio.Task[list[Stepped | Exception]]] = set()

    @classmethod
    def of_application(cls, name: str, owner: str = "local", fingerprint: str | None = None) -> Replicas:
        """The PLM owner that runs as a Serve application in this cluster.

        Raises:
            UserError: no such application runs, or it has no PLM owner.
        """
        label = f"plm.serve={name}"
        try:
            running = serve.status().applications
        except RayServeException:
            running = {}
        if name not in running or _DEPLOYMENT not in running[name].deployments:
            owners = sorted(n for n, application in running.items() if _DEPLOYMENT in application.deployments)
            raise UserError(
                f"{label}: no PLM owner of this name runs in this Ray cluster, only: {', '.join(owners) or 'none'}. "
                "Start one, such as with: serve deploy serve_configs/cluster.yaml"
            )
        return cls(serve.get_deployment_handle(_DEPLOYMENT, app_name=name), owner, fingerprint, label)

    async def describe(self) -> Description:
        if self._description is None:
            description: Description = await self._call(self._handle.describe)
            if self._fingerprint not in (None, description.card.fingerprint):
                raise FingerprintMismatch(self._label, description.card.label, str(self._fingerprint))
            self._fingerprint, self._description = description.card.fingerprint, description
        return self._description

    async def _pinned(self) -> str:
        """The fingerprint that every frame carries."""
        return self._fingerprint or (await self.describe()).card.fingerprint

    async def lm_head(self) -> LMHeadBundle:
        return LMHeadBundle.from_files(codec.decode_files(await self.lm_head_bytes()))

    async def lm_head_bytes(self) -> bytes:
        """The LM-head bundle, as the frame that crosses the line."""
        return await self._call(self._handle.lm_head, await self._pinned())

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        fingerprint = await self._pinned()
        body = await run_in_executor(_TOKEN_BYTES * batch.tokens, codec.encode_extract, batch, fingerprint)
        answer = await self.extract_bytes(body, batch)
        return await run_in_executor(len(answer), codec.decode_rows, answer)

    async def extract_bytes(self, body: bytes, batch: ExtractBatch) -> bytes:
        """The same for a batch's frame, frame out."""
        replica, answer = await self._call(self._handle.extract, self._owner, body)
        if batch.for_gradient:
            self._graph_replica[await _key_of(batch)] = replica
            if len(self._graph_replica) > _MAX_GRAPHS:
                del self._graph_replica[next(iter(self._graph_replica))]
        return answer

    async def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        answer = await self.read_prefix_bytes(codec.encode_text(token_ids, await self._pinned()))
        return (await run_in_executor(len(answer), codec.decode_prefix, answer))[0]

    async def read_prefix_bytes(self, body: bytes) -> bytes:
        """The same, frame in and frame out."""
        return await self._call(self._handle.read_prefix, self._owner, body)

    async def put_prefix(self, prefix: Prefix) -> None:
        fingerprint = await self._pinned()
        await self.put_prefix_bytes(
            await run_in_executor(prefix.embeddings.nbytes, codec.encode_prefix, prefix, fingerprint)
        )

    async def put_prefix_bytes(self, body: bytes) -> None:
        """The same for a frame: every replica keeps it; one that starts later answers `PrefixLost`."""
        try:
            response = Context().run(self._handle.broadcast, "put_prefix", self._owner, body)
            answers = await response.results_async(return_exceptions=True)
        except (RayError, RayServeException) as error:
            raise Busy(f"no replica of the PLM answers ({type(error).__name__})") from None
        refused = next((answer for answer in answers if isinstance(answer, UserError | ValueError)), None)
        if refused is not None:
            raise self._relabelled(refused) from None
        if all(isinstance(answer, Exception) for answer in answers):
            raise Busy("no replica of the PLM answers")

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        fingerprint = await self._pinned()
        body = await run_in_executor(d_state_NH.nbytes, codec.encode_gradient, batch, d_state_NH, fingerprint)
        answer = await self.gradient_bytes(body, batch)
        return await run_in_executor(len(answer), codec.decode_rows, answer)

    async def gradient_bytes(self, body: bytes, batch: ExtractBatch) -> bytes:
        """The same for a batch's frame, frame out, by the replica that may have kept its graph."""
        replica = self._graph_replica.pop(await _key_of(batch), None)
        handle = self._handle if replica is None else self._handle.options(session_id=f"{replica}/")
        return await self._call(handle.gradient, self._owner, body)

    async def end(self) -> None:
        """Wait until the sessions that cancelled calls have opened are closed."""
        await asyncio.gather(*self._answering, return_exceptions=True)

    async def _call(self, method: Any, *args: Any) -> Any:
        """Call any replica.

        Raises:
            UserError: the replica refused; Busy: it died, or there is none.
        """
        response = method.remote(*args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (UserError, Busy, PrefixLost) as error:
            raise self._relabelled(error) from None
        except (RayError, RayServeException) as error:
            raise Busy(f"no replica of the PLM answers ({type(error).__name__})") from None

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        """As `PLMClient.step`; while replicas of two PLMs run, `FingerprintMismatch` may stand in single places."""
        fingerprint = await self._pinned()
        groups: dict[str, list[int]] = {}
        for number, step in enumerate(steps):
            replica = self._owner_replica.get(step.session)
            # Openings go singly, so that Serve spreads them over replicas. Those that wait for slots stay together: no
            # other answer's opening may queue between those of one answer.
            groups.setdefault(replica or ("?" if step.waits else f"?{step.session}"), []).append(number)
        outcomes: list[Stepped | Exception] = [SessionLost()] * len(steps)

        async def step_group(replica: str, numbers: list[int]) -> None:
            group = [steps[number] for number in numbers]
            for number, outcome in zip(numbers, await self._step_at(replica, group, fingerprint), strict=True):
                outcomes[number] = outcome

        await asyncio.gather(*(step_group(replica, numbers) for replica, numbers in groups.items()))
        mismatches = [outcome for outcome in outcomes if isinstance(outcome, FingerprintMismatch)]
        if mismatches and len(mismatches) == len(outcomes):
            raise mismatches[0]
        return outcomes

    async def _step_at(self, replica: str, steps: Sequence[Step], fingerprint: str) -> list[Stepped | Exception]:
        handle = self._handle if replica.startswith("?") else self._handle.options(session_id=f"{replica}/")
        size = _TOKEN_BYTES * sum(len(step.tokens) for step in steps)
        body = await run_in_executor(size, codec.encode_steps, steps, fingerprint)
        self._in_flight.update(step.session for step in steps)
        # A task of its own receives the answer even if the caller disconnects: only the answer says which replica holds
        # the sessions. Its own context: in that of an ended request, Serve would cancel later calls as well.
        context = Context()
        response = context.run(handle.step.remote, self._owner, body)
        answering = asyncio.create_task(self._receive(response, steps), context=context)
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            if not answering.done():
                self._closed.update(step.session for step in steps if step.session not in self._owner_replica)
                response.cancel()
            raise

    async def _receive(self, response: Any, steps: Sequence[Step]) -> list[Stepped | Exception]:
        names = [step.session for step in steps]
        replica: str | None = None
        outcomes: list[Stepped | Exception]
        try:
            replica, body = await response
            outcomes = await run_in_executor(len(body), codec.decode_stepped, body, UserError)
        except (BackPressureError, Busy) as error:
            outcomes = [Busy(str(error), getattr(error, "retry_after", 1.0))] * len(steps)
        except UserError as error:
            outcomes = [self._relabelled(error)] * len(steps)
        except (RayError, RayServeException) as error:  # the replica died or is being replaced: try another
            for name in names:
                self._owner_replica.pop(name, None)
            outcomes = [Busy(f"no replica of the PLM answers ({type(error).__name__})", 0.1)] * len(steps)
        finally:
            self._in_flight.subtract(names)
            self._in_flight += Counter()  # drops zero counts
            closed = self._closed.intersection(names)
            self._closed -= closed
        if replica is not None:
            for name, outcome in zip(names, outcomes, strict=True):
                if isinstance(outcome, Stepped):
                    self._owner_replica[name] = replica
                    if len(self._owner_replica) > _MAX_SESSIONS:  # sessions that were never closed
                        del self._owner_replica[next(iter(self._owner_replica))]
                else:
                    self._owner_replica.pop(name, None)
        if closed and replica is None:  # the answer of the cancelled call is lost
            await self._close_everywhere(sorted(closed))
        elif closed:  # their replica is known now
            await self.close(sorted(closed))
        return outcomes

    async def close(self, sessions: Sequence[str]) -> None:
        groups: dict[str, list[str]] = {}
        for session in sessions:
            if replica := self._owner_replica.pop(session, None):
                groups.setdefault(replica, []).append(session)
            elif self._in_flight[session]:
                self._closed.add(session)
        for replica, names in groups.items():
            with suppress(RayError, RayServeException):  # a dead replica has lost its sessions
                await Context().run(self._handle.options(session_id=f"{replica}/").close.remote, self._owner, names)

    async def _close_everywhere(self, sessions: list[str]) -> None:
        with suppress(RayError, RayServeException):
            response = Context().run(self._handle.broadcast, "close", self._owner, sessions)
            await response.results_async(return_exceptions=True)

    def _relabelled(self, error: Exception) -> Exception:
        """The replica's error, without Ray's traceback, with this label for the PLM owner."""
        cause = getattr(error, "cause", error)
        if isinstance(cause, FingerprintMismatch):
            return FingerprintMismatch(self._label, cause.found, cause.expected)
        return cause


async def _key_of(batch: ExtractBatch) -> str:
    return await run_in_executor(_TOKEN_BYTES * batch.tokens, lambda: batch.key)
