"""Shows the progress of a stage: a bar with rate and time left on a terminal, periodic plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
console = Console(soft_wrap=True)
_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Counts steps and rows; a stage calls `advance` only."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.rows, self.note = 0, 0, ""
        self.started = self.last_line = time.monotonic()

    def advance(self, steps: int = 1, rows: int = 0, note: str = "") -> None:
        self.done += steps
        self.rows += rows
        self.note = note or self.note
        self.show()

    @property
    def rate(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.started)
        return f"{self.rows / seconds:,.0f} rows/s" if self.rows else f"{self.done / seconds:,.1f} {self.unit}/s"

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last_line < _SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.last_line = now
        left = (now - self.started) / max(1, self.done) * max(0, self.total - self.done)
        logger.info(
            "%s: %d/%d %s, %s, %.0f s left %s", self.title, self.done, self.total, self.unit, self.rate, left, self.note
        )


class _BarTracker(ProgressBar):
    def __init__(self, title: str, total: int, unit: str, bar: Progress) -> None:
        super().__init__(title, total, unit)
        self.bar = bar
        self.task = bar.add_task(title, total=total, rate="", note="")

    def show(self) -> None:
        self.bar.update(self.task, completed=self.done, rate=self.rate, note=self.note)


@contextmanager
def track(title: str, total: int, unit: str = "steps") -> Iterator[ProgressBar]:
    """The progress of `total` steps, for the time of the block."""
    if not console.is_terminal:
        yield ProgressBar(title, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _BarTracker(title, total, unit, bar)
