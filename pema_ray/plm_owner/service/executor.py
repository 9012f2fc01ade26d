"""Large frames are encoded and decoded in a thread, so that the event loop stays free for other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SMALL = 2**16  # bytes; less is done sooner than a thread has begun


async def run_in_executor(size: int, work: Callable[..., T], *args: object) -> T:
    """`work(*args)`, in a thread if it concerns more than a few bytes.

    Args:
        size: bytes that are read or made, roughly.
    """
    return work(*args) if size <= _SMALL else await asyncio.to_thread(work, *args)
