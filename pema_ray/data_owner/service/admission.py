"""Admission to the API: every request gets an id, bodies have a size limit, and each request is logged.

The log has paths, statuses and seconds; never prompts or answers.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)
_HEADER = b"x-request-id"
_LONGEST = 64  # characters of an id that a client sends


class Admission:
    """ASGI middleware.

    Args:
        max_bytes: of a request's body, with or without a Content-Length.
        count: called with the counter to increase: `requests`, `refused_<status>`.
    """

    def __init__(self, app: Any, max_bytes: int, count: Callable[[str], None]) -> None:
        self._app, self._max_bytes, self._count = app, max_bytes, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started = _request_id(scope), time.perf_counter()
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
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, request_id.encode())]}
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
                found = {"id": request_id, "path": scope["path"], "status": status, "bytes": size}
                seconds = round(time.perf_counter() - started, 4)
                logger.info("%s %s", scope["method"], status, extra={**found, "seconds": seconds})


def _request_id(scope: Any) -> str:
    found = dict(scope.get("headers", ())).get(_HEADER, b"").decode("latin-1")
    return found if 0 < len(found) <= _LONGEST and found.isascii() and found.isprintable() else uuid.uuid4().hex
