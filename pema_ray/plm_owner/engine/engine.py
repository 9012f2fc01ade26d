"""The engine of a PLM owner: takes and answers requests on the event loop, runs passes in the compute thread.

The event loop never waits for torch. Between two passes the batcher admits new requests and drops cancelled ones, so a
client that disconnects frees its slot within one pass. N rows, H hidden.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped
from pema_ray.line.prefix import Prefix
from pema_ray.plm_owner.engine.batcher import Batcher, Job
from pema_ray.plm_owner.engine.sessions import StepJob
from pema_ray.runtime.hardware import compute_thread
from pema_ray.runtime.metrics import Metrics, NoMetrics

_SLOT_POLL = 0.02  # seconds; a slot becomes free by a request, or once its session has idled long enough


class Engine:
    """Runs a batcher. All its methods belong to the event loop that it was made on.

    Args:
        make: loads the PLM and makes its batcher; called in the thread that runs its passes.
    """

    def __init__(self, make: Callable[[], Batcher]) -> None:
        self._make = make
        self._thread = compute_thread()
        self._wake = asyncio.Event()
        self._changes: list[Callable[[], None]] = []
        self._futures: dict[Job, asyncio.Future[Any]] = {}
        self._loop: asyncio.Task[None] | None = None
        self.failure: BaseException | None = None
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
        """End; answers running steps with `SessionLost`."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._loop
        self._answer_all(SessionLost())
        await asyncio.wrap_future(self._thread.submit(int))  # the end of the running pass

    async def step(self, owner: str, steps: Sequence[Step], timeout: float = 60.0) -> list[Stepped | Exception]:
        """Take steps of different sessions of one data owner; errors stand in their places, as `PLMClient.step` says.

        Args:
            timeout: seconds after which a step that has not begun is `Busy`.

        Raises:
            Busy: the engine has failed.
        """
        deadline = time.monotonic() + timeout
        return await self._answers(lambda: [self.batcher.submit(owner, step, deadline) for step in steps], len(steps))

    async def extract(self, owner: str, batch: ExtractBatch, timeout: float = 60.0) -> torch.Tensor:
        """Representations `[N, H]` of a batch, on the CPU.

        Args:
            timeout: seconds after which a batch that has not begun is `Busy`.

        Raises:
            UserError: a sequence is too long, or holds a token that the PLM does not embed.
            Busy: the batch waited too long, or the engine has failed.
        """
        deadline = time.monotonic() + timeout
        return await self._extraction(lambda: [self.batcher.submit_extraction(owner, batch, deadline)])

    async def gradient(
        self, owner: str, batch: ExtractBatch, d_state_NH: torch.Tensor, timeout: float = 60.0
    ) -> torch.Tensor:
        """The gradient `[n, width]` of the batch's prefix, on the CPU; raises as `extract` does, and `PrefixLost`."""
        deadline = time.monotonic() + timeout
        return await self._extraction(lambda: [self.batcher.submit_gradient(owner, batch, d_state_NH, deadline)])

    async def put_prefix(self, owner: str, prefix: Prefix, timeout: float = 60.0) -> None:
        """Keep a prefix; requests that come later find it. Raises as `read_prefix` and `Prefixes.check` do."""
        prefixes = self.batcher.prefixes
        prefixes.check(prefix)
        if prefix.text and prefixes.start_of(owner, prefix.text) is None:
            prefixes.keep_start(owner, prefix.text, await self._read(owner, prefix.text, timeout))
        prefixes.put(owner, prefix)

    async def read_prefix(self, owner: str, token_ids: Sequence[int], timeout: float = 60.0) -> Prefix:
        """The keys and values of a text; raises as `extract` does, and UserError if no prefix may start from it, or if
        they are kept here."""
        if self.batcher.config.prefix_start == "kept":
            raise UserError("This PLM owner keeps the keys and values of texts to itself: put a prefix with its text.")
        return await self._read(owner, token_ids, timeout)

    async def _read(self, owner: str, token_ids: Sequence[int], timeout: float) -> Prefix:
        if not token_ids:
            raise UserError("A prefix starts from at least one token.")
        deadline = time.monotonic() + timeout
        return await self._extraction(lambda: [self.batcher.submit_read(owner, token_ids, deadline)])

    async def _extraction(self, submit: Callable[[], Sequence[Job]]) -> Any:
        (answer,) = await self._answers(submit, 1)
        if isinstance(answer, SessionLost):
            raise Busy("the engine has stopped.")
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _answers(self, submit: Callable[[], Sequence[Job]], count: int) -> list[Any]:
        if self.failure is not None:
            raise Busy(f"the engine has failed: {self.failure}")
        jobs: list[Job] = []
        futures = [asyncio.get_running_loop().create_future() for _ in range(count)]

        def begin() -> None:
            jobs.extend(submit())
            self._futures.update(zip(jobs, futures, strict=True))

        self._change(begin)
        try:
            return list(await asyncio.gather(*futures))
        except asyncio.CancelledError:  # the caller has disconnected
            self._change(lambda: _cancel(jobs))
            raise

    async def close(self, owner: str, sessions: Sequence[str]) -> None:
        """Forget sessions."""
        batcher = self.batcher
        for session in sessions:
            self._change(partial(batcher.close, owner, session))

    @property
    def healthy(self) -> bool:
        """Whether passes can still run."""
        return self.failure is None

    def _change(self, change: Callable[[], None]) -> None:
        self._changes.append(change)
        self._wake.set()

    async def _serve(self) -> None:
        try:
            while True:
                self.batcher.forget_abandoned()
                if not self.batcher.busy:
                    await self._next_change(self.batcher.config.forget_seconds / 4)
                self._wake.clear()
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
                    self._answer(job)
                if not done and not self.batcher.passes:  # all wait for a slot
                    await self._next_change(_SLOT_POLL)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.failure = error
            self._answer_all(Busy(f"the engine has failed: {error}"))
            raise

    async def _next_change(self, seconds: float) -> None:
        """Wait for a request, at most for `seconds`."""
        if not self._changes:
            with suppress(TimeoutError):  # `wait_for` of Python 3.11 may lose a cancellation
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _answer(self, job: Job) -> None:
        kind = "steps" if isinstance(job, StepJob) else "extractions"
        self.counts[kind if not isinstance(job.result, Exception) else f"{kind}_not_taken"] += 1
        future = self._futures.pop(job)
        # its caller will never learn of the session that a cancelled step has just opened
        if future.cancelled() and isinstance(job, StepJob) and job.step.position == 0:
            self.batcher.close(*job.key)
        if not future.done():
            future.set_result(job.result)

    def _answer_all(self, answer: Exception) -> None:
        """Answer every request, including those that arrived during the last pass."""
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
