"""What actors wait for, shown where the build was started: a small Ray actor that keeps the latest text of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)
_POLL_SECONDS = 1.0
OnWait = Callable[[str], None]


class _Board:
    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def set(self, actor: str, text: str) -> None:
        self._texts[actor] = text

    def latest(self) -> str:
        waiting = [text for text in self._texts.values() if text]
        more = f" ({len(waiting)} actors wait)" if len(waiting) > 1 else ""
        return waiting[-1] + more if waiting else ""


def on_wait_of(actor: str, board: Any) -> OnWait:
    """An actor's `on_wait`: writes to the board, or to the log if `board` is None."""

    def on_wait(text: str) -> None:
        if board is None:
            logger.info("%s", text or "continues")
        else:
            board.set.remote(actor, text)

    return on_wait


@contextmanager
def showing(on_wait: OnWait) -> Iterator[Any]:
    """A board for the time of the block; a thread calls `on_wait` with each new text, "" when no actor waits."""
    import ray
    from ray.exceptions import RayError

    board: Any = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    ended = threading.Event()

    def poll() -> None:
        shown = ""
        while not ended.wait(_POLL_SECONDS):
            try:
                text: Any = ray.get(board.latest.remote(), timeout=5)
            except RayError:  # the board restarts, or Ray shuts down
                continue
            if text != shown:
                shown = text
                on_wait(text)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join()
        ray.kill(board)
