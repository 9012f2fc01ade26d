"""The PLM owner's public API: all that a data owner of another organisation can request.

Bodies and answers of extraction and sessions are frames of the line (`line.codec`); errors are JSON sentences. Every
request but the health check and this description needs a key, and is logged without its contents. Extraction, steps,
prefixes, gradients and LM heads count against their owner's quota; the memory of its concurrent requests is limited.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, SessionLost, Step, codec
from pema_ray.line.prefix import PrefixShape
from pema_ray.line.protocol import BACKWARD_TOKENS, LONGEST_NAME, PrefixLost
from pema_ray.plm_owner.service.access import Access, Account, Refused, Reservation
from pema_ray.plm_owner.service.executor import run_in_executor
from pema_ray.plm_owner.service.replicas import Replicas
from pema_ray.runtime.serving.http import invalid_field, request_id
from pema_ray.runtime.settings import Section

_FRAME = {"content": {codec.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
Authorization = Annotated[str | None, Header(description="Bearer and your key.")]
Fingerprint = Annotated[str | None, Header(alias="X-PLM-Fingerprint", description="Refuse any other PLM.")]
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"description": "A frame of the line.", **_FRAME}}
_FRAME_BODY = {"requestBody": {"required": True, **_FRAME}}
_NAMES_SCHEMA = {
    "type": "array",
    "maxItems": 4096,
    "items": {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME},
}
_NAMES_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": _NAMES_SCHEMA}}}}
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]
_Sessions = Annotated[list[_Name], msgspec.Meta(max_length=4096)]
_UNTIL_SENT = "pema_ray.until_sent"
_STATE_BYTES = 4  # of a number of a representation, at most
_MAX_LINES = 4  # of one data owner: the PLMs before and after an update, and spare ones


class RequestLimits(Section):
    """Limits of single requests, and of one data owner's running requests."""

    max_body_mb: float = Field(default=16, gt=0)
    max_steps: int = Field(default=256, ge=1)
    """Sessions of one message."""
    max_rows: int = Field(default=16384, ge=1)
    """Representations of one answer."""
    max_draft: int = Field(default=32, ge=0)
    session_seconds: float = Field(default=600, gt=0)
    """A session without steps for so long no longer counts."""
    max_requests: int = Field(default=128, ge=1)
    """Of one data owner, running at the same time."""
    max_held_mb: float = Field(default=512, gt=0)
    """Bodies and answers of one data owner's running requests."""
    lm_heads_per_minute: int = Field(default=10, ge=1)
    """To one data owner; an LM head may be hundreds of megabytes."""


@dataclass
class _Request:
    """One request of an admitted data owner."""

    request: Request
    account: Account
    reservation: Reservation
    used: dict[str, int] = field(default_factory=dict)
    """Its counted and logged amounts."""


class _UntilSent:
    """ASGI middleware: frees a request's resources when its answer is sent or its caller disconnects."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with ExitStack() as stack:
            scope[_UNTIL_SENT] = stack
            await self._app(scope, receive, send)


class _Endpoints:
    """What each endpoint does for an admitted data owner, and what all endpoints share.

    Args:
        replicas: the engine's replicas, for a data owner's name and a PLM's fingerprint.
    """

    def __init__(self, access: Access, limits: RequestLimits, replicas: Callable[[str, str | None], Replicas]) -> None:
        self._access, self._limits, self._replicas = access, limits, replicas
        self.lines: dict[str, dict[str, Replicas]] = {}
        self.counts: Counter[str] = Counter()
        self._heads: dict[str, asyncio.Task[bytes]] = {}

    # ── shared ──────────────────────────────────────────────────────────────

    async def perform(
        self,
        request: Request,
        authorization: str | None,
        what: str,
        work: Callable[[_Request], Awaitable[Response]],
        makes_room: bool = False,
    ) -> Response:
        """Admit, perform, count and log one request; one that `makes_room` is never refused for lack of it."""
        started = time.perf_counter()
        response: Response | None = None
        number = request_id(request.headers.get("x-request-id", ""))
        name, used, status = "", {}, 499  # of a caller that disconnects before the answer
        limits = self._limits
        try:
            account = await self._access.admit(authorization)
            name = account.client.name
            account.forget_idle(limits.session_seconds)
            allowed = (math.inf, math.inf) if makes_room else (limits.max_requests, limits.max_held_mb * 2**20)
            reservation = Reservation(account, *allowed)
            request.scope[_UNTIL_SENT].enter_context(reservation)
            response = await work(_Request(request, account, reservation, used))
        except ClientDisconnect:
            raise
        except Exception as error:
            response = _refusal(error)
            if response is None:
                status = 500
                raise
        finally:
            status = status if response is None else response.status_code
            used |= {} if response is None else {"sent_bytes": len(response.body)}
            seconds = round(time.perf_counter() - started, 4)
            self.counts.update({"requests": 1, f"refused_{status}": status >= 400} | used)
            await self._access.note(id=number, client=name, what=what, status=status, seconds=seconds, **used)
        assert response is not None
        response.headers["X-Request-Id"] = number
        return response

    async def _line_of(self, account: Account, fingerprint: str | None) -> Replicas:
        """The data owner's line to one PLM; without a fingerprint, to the present one.

        Raises:
            FingerprintMismatch: another PLM is present.
        """
        name = account.client.name
        line = self.lines.get(name, {}).get(fingerprint or "")
        if line is None:
            line = self._replicas(name, fingerprint)
            await line.describe()
            if fingerprint is not None:
                of_owner = self.lines.setdefault(name, {})
                line = of_owner.setdefault(fingerprint, line)
                if len(of_owner) > _MAX_LINES:
                    del of_owner[next(iter(of_owner))]
        return line

    async def _head_of(self, line: Replicas) -> bytes:
        """The LM head's frame, made once for all requests."""
        fingerprint = (await line.describe()).card.fingerprint
        task = self._heads.get(fingerprint)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            self._heads.clear()  # of an earlier PLM
            # in a context of its own: it outlives the request that came first
            self._heads[fingerprint] = asyncio.create_task(line.lm_head_bytes(), context=Context())
        return await asyncio.shield(self._heads[fingerprint])

    async def _body_of(self, call: _Request, mb: float) -> bytes:
        """The body, never more than `mb` of it."""
        limit, parts, size = int(mb * 2**20), [], 0
        async for part in call.request.stream():
            size += len(part)
            if size > limit:
                raise Refused(413, f"The body is larger than {mb:g} MiB.")
            call.reservation.add(len(part))
            parts.append(part)
            call.used["received_bytes"] = size
        return b"".join(parts)

    # ── endpoints ───────────────────────────────────────────────────────────

    async def model(self, call: _Request, fingerprint: str | None) -> Response:
        quota = call.account.client.quota.model_dump(exclude_none=True)
        plm = await (await self._line_of(call.account, fingerprint)).describe()
        engine = {"max_session_tokens": plm.limits.max_tokens, "max_sessions": plm.limits.max_sessions}
        shape = None if plm.prefix_shape is None else asdict(plm.prefix_shape)
        limits = self._limits.model_dump()
        return JSONResponse(
            {
                **plm.card.to_dict(),
                **engine,
                "prefix_shape": shape,
                "keeps_start": plm.keeps_start,
                "limits": limits,
                "quota": quota,
            }
        )

    async def lm_head(self, call: _Request, fingerprint: str | None) -> Response:
        call.account.spend_head(self._limits.lm_heads_per_minute)
        line = await self._line_of(call.account, fingerprint)
        return Response(await self._head_of(line), media_type=codec.MEDIA_TYPE)  # shared, so nothing is reserved

    async def extract(self, call: _Request) -> Response:
        limits = self._limits
        body = await self._body_of(call, limits.max_body_mb)
        batch, fingerprint = await run_in_executor(len(body), codec.decode_extract, body)
        call.used |= {"rows": batch.rows, "tokens": batch.tokens}
        line = await self._line_of(call.account, fingerprint)
        if batch.rows > limits.max_rows:
            raise Refused(413, f"{batch.rows} rows in one request; {limits.max_rows} are allowed.")
        call.reservation.add(batch.rows * (await line.describe()).card.hidden_size * _STATE_BYTES)
        return await self._counted(call, batch.rows, batch.tokens, lambda: line.extract_bytes(body, batch))

    async def read_prefix(self, call: _Request) -> Response:
        body = await self._body_of(call, self._limits.max_body_mb)
        token_ids, fingerprint = await run_in_executor(len(body), codec.decode_text, body)
        line = await self._line_of(call.account, fingerprint)
        size = len(token_ids) * (await _shape_of(line)).width * _STATE_BYTES
        if size > self._limits.max_body_mb * 2**20:  # it could never be put
            raise Refused(
                413, f"A prefix of {len(token_ids)} tokens has {size / 2**20:.1f} MiB, more than max_body_mb allows."
            )
        call.reservation.add(size)
        return await self._counted(call, len(token_ids), len(token_ids), lambda: line.read_prefix_bytes(body))

    async def put_prefix(self, call: _Request) -> Response:
        body = await self._body_of(call, self._limits.max_body_mb)
        prefix, fingerprint = await run_in_executor(len(body), codec.decode_prefix, body)
        account, positions = call.account, len(prefix)
        call.used |= {"tokens": positions}
        line = await self._line_of(account, fingerprint)
        await _shape_of(line)
        spent_at = account.spend(0, positions, set())
        try:
            await line.put_prefix_bytes(body)
        except Exception:
            account.refund(spent_at, 0, positions)
            raise
        account.prefix_bytes = max(account.prefix_bytes, positions * prefix.shape.width * _STATE_BYTES)
        return Response(status_code=204)

    async def gradient(self, call: _Request) -> Response:
        limits = self._limits
        body = await self._body_of(call, limits.max_body_mb)
        batch, _, fingerprint = await run_in_executor(len(body), codec.decode_gradient, body)
        line = await self._line_of(call.account, fingerprint)
        await _shape_of(line)
        if batch.rows > limits.max_rows:
            raise Refused(413, f"{batch.rows} rows in one request; {limits.max_rows} are allowed.")
        call.reservation.add(call.account.prefix_bytes)
        tokens = BACKWARD_TOKENS * batch.tokens
        return await self._counted(call, batch.rows, tokens, lambda: line.gradient_bytes(body, batch))

    async def _counted(
        self, call: _Request, rows: int, tokens: int, answer: Callable[[], Awaitable[bytes]]
    ) -> Response:
        """The answer, for which rows and tokens are spent, if there is one."""
        call.used |= {"rows": rows, "tokens": tokens}
        spent_at = call.account.spend(rows, tokens, set())
        try:
            return Response(await answer(), media_type=codec.MEDIA_TYPE)
        except Exception:
            call.account.refund(spent_at, rows, tokens)
            raise

    async def step(self, call: _Request) -> Response:
        limits = self._limits
        body = await self._body_of(call, limits.max_body_mb)
        steps, fingerprint = await run_in_executor(len(body), codec.decode_steps, body)
        if len(steps) > limits.max_steps:
            raise Refused(413, f"{len(steps)} steps in one message; {limits.max_steps} are allowed.")
        rows, tokens = _cost(steps)
        call.used |= {"sessions": len(steps), "rows": rows, "tokens": tokens}
        if rows > limits.max_rows or any(s.draft > limits.max_draft for s in steps):
            raise Refused(
                413, f"At most {limits.max_rows} states in one answer, and {limits.max_draft} drafted tokens a step."
            )
        line = await self._line_of(call.account, fingerprint)
        size = rows * (await line.describe()).card.hidden_size * _STATE_BYTES
        call.reservation.add(size)
        spent_at = call.account.spend(rows, tokens, {s.session for s in steps})
        try:
            outcomes = await line.step(steps)
        except Exception as error:
            _refund_failed(call.account, spent_at, steps, [error] * len(steps))
            raise
        _refund_failed(call.account, spent_at, steps, outcomes)
        return Response(await run_in_executor(size, codec.encode_stepped, outcomes), media_type=codec.MEDIA_TYPE)

    async def close(self, call: _Request) -> Response:
        names_mb = min(self._limits.max_body_mb, 1.0)  # of a list of names, which is never refused for lack of room
        try:
            sessions = msgspec.json.decode(await self._body_of(call, names_mb), type=_Sessions)
        except msgspec.MsgspecError as error:
            raise Refused(400, f"A list of up to 4,096 sessions' names is expected: {error}") from None
        call.used["sessions"] = len(sessions)
        for session in sessions:
            call.account.sessions.pop(session, None)
        for line in list(self.lines.get(call.account.client.name, {}).values()):
            await line.close(sessions)
        return Response(status_code=204)


def make_api(access: Access, limits: RequestLimits, replicas: Callable[[str, str | None], Replicas]) -> FastAPI:
    """The application; arguments as in `_Endpoints`."""
    api = FastAPI(title="pema-ray PLM owner", description=__doc__ or "", version="1", docs_url="/docs")
    api.add_middleware(_UntilSent)
    endpoints = _Endpoints(access, limits, replicas)
    api.state.lines, api.state.counts = endpoints.lines, endpoints.counts
    perform = endpoints.perform

    @api.get("/v1/model")
    async def model(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Name, fingerprint and sizes of the PLM, and your limits."""
        return await perform(request, authorization, "model", lambda call: endpoints.model(call, fingerprint))

    @api.get("/v1/lm-head", responses=_ANSWER)
    async def lm_head(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """The LM-head bundle: final norm, LM head and tokenizer, as files in a frame."""
        return await perform(request, authorization, "lm-head", lambda call: endpoints.lm_head(call, fingerprint))

    @api.post("/v1/extract", responses=_ANSWER, openapi_extra=_FRAME_BODY)
    async def extract(request: Request, authorization: Authorization = None) -> Any:
        """Representations of the requested positions of a batch."""
        return await perform(request, authorization, "extract", endpoints.extract)

    @api.post("/v1/prefixes/read", responses=_ANSWER, openapi_extra=_FRAME_BODY)
    async def read_prefix(request: Request, authorization: Authorization = None) -> Any:
        """The keys and values of a text, from which a prefix may start."""
        return await perform(request, authorization, "read-prefix", endpoints.read_prefix)

    @api.post("/v1/prefixes", status_code=204, response_model=None, openapi_extra=_FRAME_BODY)
    async def put_prefix(request: Request, authorization: Authorization = None) -> Any:
        """Keep a key-value prefix: extractions, steps and gradients name it by the sha256 of its content."""
        return await perform(request, authorization, "put-prefix", endpoints.put_prefix)

    @api.post("/v1/gradient", responses=_ANSWER, openapi_extra=_FRAME_BODY)
    async def gradient(request: Request, authorization: Authorization = None) -> Any:
        """The gradient of a prefix, from that of a batch's representations."""
        return await perform(request, authorization, "gradient", endpoints.gradient)

    @api.post("/v1/sessions/step", responses=_ANSWER, openapi_extra=_FRAME_BODY)
    async def step(request: Request, authorization: Authorization = None) -> Any:
        """Steps of sessions: open, continue, rewind, in one message. Errors of single steps stand in their places."""
        return await perform(request, authorization, "step", endpoints.step)

    @api.post("/v1/sessions/close", status_code=204, response_model=None, openapi_extra=_NAMES_BODY)
    async def close(request: Request, authorization: Authorization = None) -> Any:
        """Forget sessions; unknown ones are no error."""
        return await perform(request, authorization, "close", endpoints.close, makes_room=True)

    @api.get("/healthz")
    async def health() -> Any:
        """Whether requests are served."""
        return JSONResponse({"ready": True})

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, invalid_field(error))

    @api.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    return api


async def _shape_of(line: Replicas) -> PrefixShape:
    """Of the prefixes that the PLM takes.

    Raises:
        Refused: 403, it takes none.
    """
    shape = (await line.describe()).prefix_shape
    if shape is None:
        raise Refused(403, "This PLM owner takes no prefixes and computes no gradients (adaptation: none).")
    return shape


def _cost(steps: Sequence[Step]) -> tuple[int, int]:
    """Rows and tokens of steps."""
    return sum(s.states + s.draft for s in steps), sum(len(s.tokens) for s in steps)


def _refund_failed(account: Account, spent_at: float, steps: Sequence[Step], outcomes: Sequence[object]) -> None:
    """Refund failed steps, and stop counting sessions that were not opened or are lost."""
    failed = [(s, outcome) for s, outcome in zip(steps, outcomes, strict=True) if isinstance(outcome, Exception)]
    account.refund(spent_at, *_cost([step for step, _ in failed]))
    for step, outcome in failed:
        if step.position == 0 or isinstance(outcome, SessionLost):
            account.sessions.pop(step.session, None)


def _refusal(error: Exception) -> JSONResponse | None:
    """The answer to a refused request; none if the fault is the server's."""
    if isinstance(error, Refused):
        return _error(error.status, str(error), error.retry_after)
    if isinstance(error, codec.BadFrame):
        return _error(400, str(error))
    if isinstance(error, FingerprintMismatch):
        message = f"You expect the PLM {error.expected[:64]}; this is {error.found}. Export its LM head anew."
        return _error(409, message, found=error.found)
    if isinstance(error, PrefixLost):
        return _error(410, str(error))
    if isinstance(error, UserError):
        return _error(422, str(error))
    if isinstance(error, Busy):
        return _error(503, str(error), error.retry_after)
    return None


def _error(status: int, message: str, retry_after: float | None = None, **more: str) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
    return JSONResponse({"error": {"message": message, "type": "line_error", **more}}, status, headers)
