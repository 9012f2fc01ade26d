"""The PLM owner's public API: everything a data owner of another organisation may ask, and nothing else.

Bodies of extraction and sessions are frames of the line (`line.codec`), answers too; errors are JSON sentences. Every
request but the health check and this description needs a key, and is logged without its contents; extraction, steps and
LM heads are counted against their owner's quota, and what its requests hold at the same time is bounded.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from contextvars import Context
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pema_ray.config import Section
from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, ModelCard, SessionLost, codec
from pema_ray.line.stepping import LONGEST_NAME, Busy, Step
from pema_ray.plm_owner.access import Access, Account, Held, Refused
from pema_ray.plm_owner.off_loop import off_loop
from pema_ray.plm_owner.replicas import Replicas

_FRAME = {"content": {codec.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
Authorization = Annotated[str | None, Header(description="Bearer and your key.")]
Fingerprint = Annotated[str | None, Header(alias="X-PLM-Fingerprint", description="Refuse any other PLM.")]
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"description": "A frame of the line.", **_FRAME}}
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]
_Sessions = Annotated[list[_Name], msgspec.Meta(max_length=4096)]
_UNTIL_SENT = "pema_ray.until_sent"
_STATE_BYTES = 4  # of a number of a representation, at most


class Limits(Section):
    """Of single requests, whoever sends them, and of what one data owner may have under way."""

    max_body_mb: float = Field(default=16, gt=0)
    max_steps: int = Field(default=256, ge=1)
    """Sessions of one message."""
    max_rows: int = Field(default=16384, ge=1)
    """Representations of one answer."""
    max_draft: int = Field(default=32, ge=0)
    session_seconds: float = Field(default=600, gt=0)
    """A session that is not heard of for so long counts no more."""
    max_requests: int = Field(default=128, ge=1)
    """Of one data owner, under way at the same time."""
    max_held_mb: float = Field(default=512, gt=0)
    """Bodies and answers of one data owner's requests that are under way."""
    lm_heads_per_minute: int = Field(default=10, ge=1)
    """To one data owner; an LM head may be hundreds of megabytes."""


@dataclass
class _Asked:
    """One request of a data owner that is known."""

    account: Account
    line: Replicas
    held: Held
    used: dict[str, int] = field(default_factory=dict)
    """What is counted and logged of it."""


class _UntilSent:
    """ASGI middleware: what a request holds is let go when its answer has been sent, or its caller has gone away."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with ExitStack() as stack:
            scope[_UNTIL_SENT] = stack
            await self._app(scope, receive, send)


def make_api(access: Access, limits: Limits, replicas: Callable[[str], Replicas]) -> FastAPI:
    """The application.

    Args:
        replicas: the engine's replicas, for a data owner's name.
    """
    api = FastAPI(title="pema-ray PLM owner", description=__doc__ or "", version="1", docs_url="/docs")
    api.add_middleware(_UntilSent)
    lines: dict[str, Replicas] = {}
    heads: dict[str, asyncio.Task[bytes]] = {}
    counts: Counter[str] = Counter()
    api.state.lines, api.state.counts = lines, counts

    def line_of(account: Account) -> Replicas:
        name = account.client.name
        if name not in lines:
            lines[name] = replicas(name)
        return lines[name]

    async def head_of(line: Replicas) -> bytes:
        """The LM head's frame, made once for all who ask."""
        fingerprint = (await line.describe()).fingerprint
        known = heads.get(fingerprint)
        if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
            heads.clear()  # of a PLM that was here before
            # in a context of its own: others wait for it when the request that asked first has ended
            heads[fingerprint] = asyncio.create_task(line.lm_head_bytes(), context=Context())
        return await asyncio.shield(heads[fingerprint])

    names_mb = min(limits.max_body_mb, 1.0)  # of a list of names, which is never refused for want of room

    async def perform(
        request: Request,
        authorization: str | None,
        fingerprint: str | None,
        what: str,
        work: Callable[[_Asked], Awaitable[Response]],
        makes_room: bool = False,
    ) -> Response:
        """One request: who asks, whether it may, and what it took. What makes room is never refused for want of it."""
        started, told = time.perf_counter(), request.headers.get("x-request-id", "")
        response: Response | None = None
        number = told if 0 < len(told) <= 64 and told.isascii() and told.isprintable() else uuid.uuid4().hex
        name, used, status = "", {}, 499  # of a caller that has gone away before the answer
        try:
            account = await access.admit(authorization)
            name = account.client.name
            account.forget_idle(limits.session_seconds)
            line = line_of(account)
            most = (math.inf, math.inf) if makes_room else (limits.max_requests, limits.max_held_mb * 2**20)
            held = Held(account, *most)
            request.scope[_UNTIL_SENT].enter_context(held)
            asked = _Asked(account, line, held, used)
            if fingerprint is not None and fingerprint != (card := await line.describe()).fingerprint:
                raise Refused(409, f"You expect the PLM {fingerprint}; this is {card.label}. Export its LM head anew.")
            response = await work(asked)
        except Refused as refused:
            response = _error(refused.status, str(refused), refused.retry_after)
        except codec.BadFrame as error:
            response = _error(400, str(error))
        except UserError as error:
            response = _error(422, str(error))
        except Busy as error:
            response = _error(503, str(error), error.retry_after)
        except ClientDisconnect:
            raise
        except Exception:
            status = 500
            raise
        finally:
            status = status if response is None else response.status_code
            seconds = round(time.perf_counter() - started, 4)
            counts.update({"requests": 1, f"refused_{status}": status >= 400} | used)
            await access.note(id=number, client=name, what=what, status=status, seconds=seconds, **used)
        assert response is not None
        response.headers["X-Request-Id"] = number
        return response

    async def body_of(request: Request, held: Held, mb: float = limits.max_body_mb) -> bytes:
        """The body, never more of it than is allowed."""
        most, parts, size = int(mb * 2**20), [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"The body is larger than {mb:g} MiB.")
            held.add(len(part))
            parts.append(part)
        return b"".join(parts)

    @api.get("/v1/model")
    async def model(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Name, fingerprint and sizes of the PLM, and your limits."""

        async def work(asked: _Asked) -> Response:
            quota = asked.account.client.quota.model_dump(exclude_none=True)
            return JSONResponse({**await asked.line.limits(), "limits": limits.model_dump(), "quota": quota})

        return await perform(request, authorization, fingerprint, "model", work)

    @api.get("/v1/lm-head", responses=_ANSWER)
    async def lm_head(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """The LM-head bundle: final norm, LM head and tokenizer, as files in a frame."""

        async def work(asked: _Asked) -> Response:
            asked.account.spend_head(limits.lm_heads_per_minute)
            frame = await head_of(asked.line)  # one for all: nobody holds it alone
            return Response(frame, media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "lm-head", work)

    frame_body = {"requestBody": {"required": True, **_FRAME}}

    @api.post("/v1/extract", responses=_ANSWER, openapi_extra=frame_body)
    async def extract(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Representations of the wanted positions of a batch."""

        async def work(asked: _Asked) -> Response:
            body = await body_of(request, asked.held)
            batch, largest = await off_loop(len(body), _read_batch, body)
            asked.used |= {"rows": batch.rows, "tokens": sum(map(len, batch.token_ids))}
            card = await _check_tokens(asked.line, largest)
            if batch.rows > limits.max_rows:
                raise Refused(413, f"{batch.rows} rows in one request; {limits.max_rows} are allowed.")
            asked.held.add(batch.rows * card.hidden_size * _STATE_BYTES)
            asked.account.spend(asked.used["rows"], asked.used["tokens"], set())
            return Response(await asked.line.extract_bytes(body), media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "extract", work)

    @api.post("/v1/sessions/step", responses=_ANSWER, openapi_extra=frame_body)
    async def step(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Steps of sessions: open, go on, take back, in one message. Errors of single steps stand in their places."""

        async def work(asked: _Asked) -> Response:
            body = await body_of(request, asked.held)
            steps, largest = await off_loop(len(body), _read_steps, body)
            if len(steps) > limits.max_steps:
                raise Refused(413, f"{len(steps)} steps in one message; {limits.max_steps} are allowed.")
            rows = sum(s.states + s.draft for s in steps)
            asked.used |= {"sessions": len(steps), "rows": rows, "tokens": sum(len(s.tokens) for s in steps)}
            if rows > limits.max_rows or any(s.draft > limits.max_draft for s in steps):
                raise Refused(
                    413,
                    f"At most {limits.max_rows} states in one answer, and {limits.max_draft} drafted tokens a step.",
                )
            card = await _check_tokens(asked.line, largest)
            size = rows * card.hidden_size * _STATE_BYTES
            asked.held.add(size)
            asked.account.spend(rows, asked.used["tokens"], {s.session for s in steps})
            outcomes = await asked.line.step(steps)
            for step, outcome in zip(steps, outcomes, strict=True):
                if isinstance(outcome, SessionLost) or (step.position == 0 and isinstance(outcome, Exception)):
                    asked.account.sessions.pop(step.session, None)
            return Response(await off_loop(size, codec.encode_stepped, outcomes), media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "step", work)

    names: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME}
    json_body = {"schema": {"type": "array", "maxItems": 4096, "items": names}}
    list_body = {"requestBody": {"required": True, "content": {"application/json": json_body}}}

    @api.post("/v1/sessions/close", status_code=204, response_model=None, openapi_extra=list_body)
    async def close(request: Request, authorization: Authorization = None) -> Any:
        """Forget sessions; those that are gone already are no error."""

        async def work(asked: _Asked) -> Response:
            try:
                sessions = msgspec.json.decode(await body_of(request, asked.held, names_mb), type=_Sessions)
            except msgspec.MsgspecError as error:
                raise Refused(400, f"A list of up to 4,096 sessions' names is expected: {error}") from None
            asked.used["sessions"] = len(sessions)
            for session in sessions:
                asked.account.sessions.pop(session, None)
            await asked.line.close(sessions)
            return Response(status_code=204)

        return await perform(request, authorization, None, "close", work, makes_room=True)

    @api.get("/healthz")
    async def health() -> Any:
        """Whether requests are served."""
        return JSONResponse({"ready": True})

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @api.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    return api


def _read_batch(body: bytes) -> tuple[ExtractBatch, int]:
    """A batch, and its largest token."""
    batch = codec.decode_extract(body)
    return batch, max(map(max, batch.token_ids), default=0)


def _read_steps(body: bytes) -> tuple[Sequence[Step], int]:
    """Steps, and their largest token."""
    steps = codec.decode_steps(body)
    return steps, max((max(step.tokens) for step in steps), default=0)


async def _check_tokens(line: Replicas, largest: int) -> ModelCard:
    card = await line.describe()
    if largest >= card.vocab_size:
        raise Refused(422, f"{largest} is no token of {card.label}, which has {card.vocab_size}.")
    return card


def _error(status: int, message: str, retry_after: float | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
    return JSONResponse({"error": {"message": message, "type": "line_error"}}, status, headers)
