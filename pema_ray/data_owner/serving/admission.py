"""Stands before the API: gives every request a number, refuses bodies that are too long, and logs who came and went.

The log has paths, statuses and seconds; never what was asked or answered.
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
_LONGEST = 64  # characters of a number that a client gives


class Doorkeeper:
    """ASGI middleware.

    Args:
        most_bytes: of a request's body, whether it says so beforehand or not.
        count: is told what to count: `requests`, and `refused_<status>`.
    """

    def __init__(self, app: Any, most_bytes: int, count: Callable[[str], None]) -> None:
        self._app, self._most_bytes, self._count = app, most_bytes, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, started = _number(scope), time.perf_counter()
        size, status = 0, 499  # of a client that has gone away before the answer

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise HTTPException(413, f"The request is longer than {self._most_bytes >> 20} MiB.")
            return message

        async def numbered(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (_HEADER, number.encode())]}
            await send(message)

        try:
            await self._app(scope, limited, numbered)
        except Exception:
            status = 500  # it is answered outside of this
            raise
        finally:
            if scope["path"] != "/healthz":
                self._count("requests")
                if status >= 400:
                    self._count(f"refused_{status}")
                told = {"id": number, "path": scope["path"], "status": status, "bytes": size}
                seconds = round(time.perf_counter() - started, 4)
                logger.info("%s %s", scope["method"], status, extra={**told, "seconds": seconds})


def _number(scope: Any) -> str:
    told = dict(scope.get("headers", ())).get(_HEADER, b"").decode("latin-1")
    return told if 0 < len(told) <= _LONGEST and told.isascii() and told.isprintable() else uuid.uuid4().hex
