"""HTTP conventions of every service: request ids, limits on bodies, access logs, one form of errors.

The log has paths, statuses and seconds; never prompts or answers. Errors are OpenAI's: `{"error": {"message": …}}`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pema_ray.errors import UserError

logger = logging.getLogger(__name__)
_HEADER = b"x-request-id"
_MAX_ID_LENGTH = 64  # characters, of a client's request id
MAX_BODY_BYTES = 8 * 2**20
"""Of a request, for services without a setting for it."""


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format. Lone surrogates in the message are replaced: they cannot be sent."""
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def invalid_field(error: RequestValidationError) -> str:
    """Which field of a request is wrong, and why."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "str", "list[str]"))
    return f"{where}: {first['msg']}" if where else first["msg"]


def handle_errors(
    api: FastAPI, status_of: Callable[[UserError], int] = lambda error: 400, not_found: str | None = None
) -> None:
    """Answer every error of a request in one form.

    Args:
        status_of: HTTP status of a `UserError`.
        not_found: the code of 404.
    """

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(invalid_field(error)), 400)

    @api.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        code = not_found if error.status_code == 404 else None
        return JSONResponse(error_body(str(error.detail), code=code), error.status_code, error.headers)

    @api.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), status_of(error))


class Admission:
    """ASGI middleware: limits bodies, assigns request ids, writes the access log.

    Args:
        max_bytes: of a request's body, with or without a Content-Length.
        count: called with the counter to increase: `requests`, `refused_<status>`.
    """

    def __init__(
        self, app: Any, max_bytes: int = MAX_BODY_BYTES, count: Callable[[str], None] = lambda name: None
    ) -> None:
        self._app, self._max_bytes, self._count = app, max_bytes, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clients_id = dict(scope.get("headers", ())).get(_HEADER, b"").decode("latin-1")
        own_id, started = request_id(clients_id), time.perf_counter()
        size, status = 0, 499  # the client disconnected before the answer

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise HTTPException(413, f"The request is longer than {self._max_bytes >> 20} MiB.")
            return message

        async def with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, own_id.encode())]}
            await send(message)

        try:
            await self._app(scope, limited, with_id)
        except Exception:
            status = 500  # answered by the error handler outside
            raise
        finally:
            if scope["path"] != "/healthz":
                self._count("requests")
                if status >= 400:
                    self._count(f"refused_{status}")
                described = {"id": own_id, "path": scope["path"], "status": status, "bytes": size}
                seconds = round(time.perf_counter() - started, 4)
                logger.info("%s %s", scope["method"], status, extra={**described, "seconds": seconds})


def request_id(clients_id: str) -> str:
    """The client's request id if it is short, printable ASCII, else a new one."""
    valid = 0 < len(clients_id) <= _MAX_ID_LENGTH and clients_id.isascii() and clients_id.isprintable()
    return clients_id if valid else uuid.uuid4().hex
