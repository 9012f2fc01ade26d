"""The engine of a PLM owner's replica: steps come in on the event loop, passes run in one thread, answers go back.

The event loop never waits for torch. Between two passes the batcher takes in what has come, so whoever has gone away
leaves his slot within one pass.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped
from pema_ray.metrics import Metrics, NoMetrics
from pema_ray.plm_owner.engine.batcher import Batcher, Job
from pema_ray.plm_owner.engine.extraction import extract

T = TypeVar("T")


class Engine:
    """Runs a batcher. All its methods belong to the event loop that it was made on.

    Args:
        make: loads the PLM and makes its batcher; called in the engine's thread, which is the only one that uses torch.
    """

    def __init__(self, make: Callable[[], Batcher]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._wake = asyncio.Event()
        self._changes: list[Callable[[], None]] = []
        self._futures: dict[Job, asyncio.Future[Stepped | Exception]] = {}
        self._loop: asyncio.Task[None] | None = None
        self._failed: BaseException | None = None
        self.batcher: Batcher
        self.metrics: Metrics = NoMetrics()
        self.counts: Counter[str] = Counter()

    async def start(self) -> Engine:
        """Load the PLM and begin.

        Raises:
            UserError: the PLM cannot be loaded or served.
        """
        self.batcher = await asyncio.get_running_loop().run_in_executor(self._thread, self._make)
        self._loop = asyncio.create_task(self._serve(), name="engine")
        return self

    async def stop(self) -> None:
        """End; steps that are under way are answered `SessionLost`."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._loop
        self._answer_all(SessionLost())
        self._thread.shutdown(wait=True)

    async def step(self, owner: str, steps: Sequence[Step], timeout: float = 60.0) -> list[Stepped | Exception]:
        """Take steps of different sessions of one data owner; errors stand in their places, as `Stepper.step` says.

        Args:
            timeout: seconds after which what has not begun is `Busy`.
        """
        self._raise_if_failed()
        deadline = time.monotonic() + timeout
        submitted: list[Job] = []
        futures = [asyncio.get_running_loop().create_future() for _ in steps]

        def submit() -> None:
            for step, future in zip(steps, futures, strict=True):
                job = self.batcher.submit(owner, step, deadline)
                submitted.append(job)
                self._futures[job] = future

        self._change(submit)
        try:
            return list(await asyncio.gather(*futures))
        except asyncio.CancelledError:  # whoever asked has gone away
            self._change(lambda: _cancel(submitted))
            raise

    async def extract(self, owner: str, batch: ExtractBatch, timeout: float = 60.0) -> torch.Tensor:
        """Representations `[N, H]` of a batch, on the CPU."""
        if batch.longest > self.batcher.max_tokens:
            raise self.batcher.too_long(batch.longest)
        return await self.call(partial(extract, self.batcher._plm, batch, self.batcher.pass_tokens))

    async def close(self, owner: str, sessions: Sequence[str]) -> None:
        """Forget sessions."""
        batcher = self.batcher

        def forget() -> None:
            for session in sessions:
                batcher.close(owner, session)

        self._change(forget)

    async def call(self, work: Callable[[], T]) -> T:
        """Run something else that uses the PLM in the engine's thread, between two passes."""
        self._raise_if_failed()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @property
    def healthy(self) -> bool:
        """Whether passes can still be run."""
        return self._failed is None

    def _raise_if_failed(self) -> None:
        if self._failed is not None:
            raise Busy(f"the engine has failed: {self._failed}")

    def _change(self, change: Callable[[], None]) -> None:
        self._changes.append(change)
        self._wake.set()

    async def _serve(self) -> None:
        try:
            while True:
                self.batcher.forget_abandoned()
                if not self._changes and not self.batcher.busy:
                    self._wake.clear()
                    with suppress(TimeoutError):  # `wait_for` of Python 3.11 may lose that this is cancelled
                        async with asyncio.timeout(self.batcher.settings.forget_seconds / 4):
                            await self._wake.wait()
                changes, self._changes = self._changes, []
                for change in changes:
                    change()
                if not self.batcher.busy:
                    continue
                done = await asyncio.get_running_loop().run_in_executor(self._thread, self.batcher.run)
                for sequences, tokens in self.batcher.passes:
                    self.metrics.observe("pass_sequences", sequences)
                    self.metrics.observe("pass_tokens", tokens)
                    self.counts.update(passes=1, tokens=tokens)
                for job in done:
                    kind = "steps" if isinstance(job.result, Stepped) else "steps_not_taken"
                    self.counts[kind] += 1
                    future = self._futures.pop(job)
                    if future.cancelled() and job.step.position == 0:  # nobody knows of the session it has just opened
                        self.batcher.close(job.owner, job.step.session)
                    if not future.done():
                        assert job.result is not None
                        future.set_result(job.result)
                if not done and not self.batcher.passes:  # all wait for a slot: let time pass, and newcomers in
                    await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed = error
            self._answer_all(Busy(f"the engine has failed: {error}"))
            raise

    def _answer_all(self, answer: Exception) -> None:
        """Nobody may be left waiting, those who came during the last pass included."""
        changes, self._changes = self._changes, []
        for change in changes:
            change()
        for future in self._futures.values():
            if not future.done():
                future.set_result(answer)
        self._futures.clear()


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancelled = True
