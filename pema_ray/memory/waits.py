"""What actors wait for, shown where the build was started: a small Ray actor that holds the latest word of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LOOKS = 1.0
OnWait = Callable[[str], None]


class _Board:
    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def tell(self, who: str, text: str) -> None:
        self._texts[who] = text

    def latest(self) -> str:
        waiting = [text for text in self._texts.values() if text]
        more = f" ({len(waiting)} actors wait)" if len(waiting) > 1 else ""
        return waiting[-1] + more if waiting else ""


def teller(board: Any, who: str) -> OnWait:
    """What an actor calls with what it waits for; the board may be none, then it is logged."""

    def tell(text: str) -> None:
        if board is None:
            logger.info("%s", text or "goes on")
        else:
            board.tell.remote(who, text)

    return tell


@contextmanager
def showing(on_wait: OnWait) -> Iterator[Any]:
    """A board for the time of the block; `on_wait` is called, in a thread, with each new text on it, "" for none."""
    import ray
    from ray.exceptions import RayError

    board: Any = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    over = threading.Event()

    def look() -> None:
        shown = ""
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                text: Any = ray.get(board.latest.remote(), timeout=5)
            except RayError:  # it is being started again, or Ray is going
                continue
            if text != shown:
                shown = text
                on_wait(text)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        over.set()
        thread.join()
        ray.kill(board)
