"""The PLM owner's public API: everything a data owner of another organisation may ask, and nothing else.

Bodies of extraction and sessions are frames of the line (`line.codec`), answers too; errors are JSON sentences. Every
request but the health check and this description needs a key, and is logged without its contents; extraction and steps
are counted against their owner's quota.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
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
from pema_ray.line import SessionLost, codec
from pema_ray.line.stepping import LONGEST_NAME, Busy
from pema_ray.plm_owner.access import Access, Account, Refused
from pema_ray.plm_owner.replicas import Replicas

_FRAME = {"content": {codec.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
Authorization = Annotated[str | None, Header(description="Bearer and your key.")]
Fingerprint = Annotated[str | None, Header(alias="X-PLM-Fingerprint", description="Refuse any other PLM.")]
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"description": "A frame of the line.", **_FRAME}}
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]
_Sessions = Annotated[list[_Name], msgspec.Meta(max_length=4096)]


class Limits(Section):
    """Of single requests, whoever sends them."""

    max_body_mb: float = Field(default=16, gt=0)
    max_steps: int = Field(default=256, ge=1)
    """Sessions of one message."""
    max_rows: int = Field(default=16384, ge=1)
    """Representations of one answer."""
    max_draft: int = Field(default=32, ge=0)
    session_seconds: float = Field(default=600, gt=0)
    """A session that is not heard of for so long counts no more."""


def make_api(access: Access, limits: Limits, replicas: Callable[[str], Replicas]) -> FastAPI:
    """The application.

    Args:
        replicas: the engine's replicas, for a data owner's name.
    """
    api = FastAPI(title="pema-ray PLM owner", description=__doc__ or "", version="1", docs_url="/docs")
    lines: dict[str, Replicas] = {}
    counts: Counter[str] = Counter()
    api.state.lines, api.state.counts = lines, counts

    def line_of(account: Account) -> Replicas:
        name = account.client.name
        if name not in lines:
            lines[name] = replicas(name)
        return lines[name]

    async def perform(
        request: Request,
        authorization: str | None,
        fingerprint: str | None,
        what: str,
        work: Callable[[Account, Replicas, dict[str, int]], Awaitable[Response]],
    ) -> Response:
        """One request: who asks, whether it may, and what it took."""
        started, told = time.perf_counter(), request.headers.get("x-request-id", "")
        response: Response | None = None
        number = told if 0 < len(told) <= 64 and told.isascii() and told.isprintable() else uuid.uuid4().hex
        name, used, status = "", {}, 499  # of a caller that has gone away before the answer
        try:
            account = access.account(authorization)
            name = account.client.name
            account.forget_idle(limits.session_seconds)
            line = line_of(account)
            if fingerprint is not None and fingerprint != (card := await line.describe()).fingerprint:
                raise Refused(409, f"You expect the PLM {fingerprint}; this is {card.label}. Export its LM head anew.")
            response = await work(account, line, used)
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
            access.log(id=number, client=name, what=what, status=status, seconds=seconds, **used)
            counts.update({"requests": 1, f"refused_{status}": status >= 400} | used)
        assert response is not None
        response.headers["X-Request-Id"] = number
        return response

    async def body_of(request: Request) -> bytes:
        """The body, never more of it than is allowed."""
        most, parts, size = int(limits.max_body_mb * 2**20), [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"The body is larger than {limits.max_body_mb:g} MiB.")
            parts.append(part)
        return b"".join(parts)

    @api.get("/v1/model")
    async def model(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Name, fingerprint and sizes of the PLM, and your limits."""

        async def work(account: Account, line: Replicas, used: dict[str, int]) -> Response:
            card = await line.limits()
            return JSONResponse(
                {**card, "limits": limits.model_dump(), "quota": account.client.quota.model_dump(exclude_none=True)}
            )

        return await perform(request, authorization, fingerprint, "model", work)

    @api.get("/v1/lm-head", responses=_ANSWER)
    async def lm_head(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """The LM-head bundle: final norm, LM head and tokenizer, as files in a frame."""

        async def work(account: Account, line: Replicas, used: dict[str, int]) -> Response:
            return Response(await line.lm_head_bytes(), media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "lm-head", work)

    frame_body = {"requestBody": {"required": True, **_FRAME}}

    @api.post("/v1/extract", responses=_ANSWER, openapi_extra=frame_body)
    async def extract(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Representations of the wanted positions of a batch."""

        async def work(account: Account, line: Replicas, used: dict[str, int]) -> Response:
            body = await body_of(request)
            batch = codec.decode_extract(body)
            used |= {"rows": batch.rows, "tokens": sum(map(len, batch.token_ids))}
            await _check_tokens(line, (max(ids) for ids in batch.token_ids))
            if batch.rows > limits.max_rows:
                raise Refused(413, f"{batch.rows} rows in one request; {limits.max_rows} are allowed.")
            account.spend(used["rows"], used["tokens"], set())
            return Response(await line.extract_bytes(body), media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "extract", work)

    @api.post("/v1/sessions/step", responses=_ANSWER, openapi_extra=frame_body)
    async def step(request: Request, authorization: Authorization = None, fingerprint: Fingerprint = None) -> Any:
        """Steps of sessions: open, go on, take back, in one message. Errors of single steps stand in their places."""

        async def work(account: Account, line: Replicas, used: dict[str, int]) -> Response:
            steps = codec.decode_steps(await body_of(request))
            if len(steps) > limits.max_steps:
                raise Refused(413, f"{len(steps)} steps in one message; {limits.max_steps} are allowed.")
            rows = sum(s.states + s.draft for s in steps)
            used |= {"sessions": len(steps), "rows": rows, "tokens": sum(len(s.tokens) for s in steps)}
            if rows > limits.max_rows or any(s.draft > limits.max_draft for s in steps):
                raise Refused(
                    413,
                    f"At most {limits.max_rows} states in one answer, and {limits.max_draft} drafted tokens a step.",
                )
            await _check_tokens(line, (max(s.tokens) for s in steps))
            account.spend(rows, used["tokens"], {s.session for s in steps})
            outcomes = await line.step(steps)
            for step, outcome in zip(steps, outcomes, strict=True):
                if isinstance(outcome, SessionLost) or (step.position == 0 and isinstance(outcome, Exception)):
                    account.sessions.pop(step.session, None)
            return Response(codec.encode_stepped(outcomes), media_type=codec.MEDIA_TYPE)

        return await perform(request, authorization, fingerprint, "step", work)

    names: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME}
    json_body = {"schema": {"type": "array", "maxItems": 4096, "items": names}}
    list_body = {"requestBody": {"required": True, "content": {"application/json": json_body}}}

    @api.post("/v1/sessions/close", status_code=204, response_model=None, openapi_extra=list_body)
    async def close(request: Request, authorization: Authorization = None) -> Any:
        """Forget sessions; those that are gone already are no error."""

        async def work(account: Account, line: Replicas, used: dict[str, int]) -> Response:
            try:
                sessions = msgspec.json.decode(await body_of(request), type=_Sessions)
            except msgspec.MsgspecError as error:
                raise Refused(400, f"A list of up to 4,096 sessions' names is expected: {error}") from None
            used["sessions"] = len(sessions)
            for session in sessions:
                account.sessions.pop(session, None)
            await line.close(sessions)
            return Response(status_code=204)

        return await perform(request, authorization, None, "close", work)

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


async def _check_tokens(line: Replicas, largest: Any) -> None:
    card = await line.describe()
    if (most := max(largest, default=0)) >= card.vocab_size:
        raise Refused(422, f"{most} is no token of {card.label}, which has {card.vocab_size}.")


def _error(status: int, message: str, retry_after: float | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
    return JSONResponse({"error": {"message": message, "type": "line_error"}}, status, headers)
