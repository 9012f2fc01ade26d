"""Encodes and decodes large frames in a thread, so that the event loop stays free for other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SMALL = 2**16  # bytes; less takes less time than starting a thread


async def run_in_executor(size: int, work: Callable[..., T], *args: object) -> T:
    """`work(*args)`, in a thread if it is large.

    Args:
        size: bytes read or made, roughly.
    """
    return work(*args) if size <= _SMALL else await asyncio.to_thread(work, *args)
