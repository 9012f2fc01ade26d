"""The decoder: generates many answers together by Gradual Unrolling, over any `PLMClient`.

Every branch waits for representations from the PLM owner, or for its next token. Tokens of all branches whose
representations have arrived are chosen together (`chooser.py`), and one message sends them. A lost session is opened
again with all its ids; the answer stays the same. Stages, evaluation, the API and the playground all call this class.
Knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from contextvars import Context
from typing import Any

from pema_ray.data_owner.decoding.beam import BeamSearch
from pema_ray.data_owner.decoding.branch import Branch
from pema_ray.data_owner.decoding.chooser import Chooser
from pema_ray.data_owner.decoding.drafts import MemoryLookup, PromptLookup
from pema_ray.data_owner.decoding.generation import Generation
from pema_ray.data_owner.decoding.predictor import Predictor
from pema_ray.data_owner.decoding.request import Answer, GenerationAborted, GenerationRequest, Token
from pema_ray.data_owner.decoding.sampling import random_stream
from pema_ray.data_owner.decoding.text import AnswerText
from pema_ray.errors import UserError
from pema_ray.line import Busy, LMHead, PLMClient, SessionLost, Step, Stepped
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.runtime.hardware import compute_thread, set_threads
from pema_ray.runtime.metrics import Metrics

logger = logging.getLogger(__name__)
_REPLAYS = 20  # of one branch without a new token before its answer is aborted
_SHORTEST_PAUSE = 0.05  # seconds between two attempts at a busy PLM owner, which may ask for longer ones
_CONCURRENT_OPENINGS = 16  # openings that wait for slots must not block the steps of open sessions
_CLOSING_SECONDS = 2.0  # to close sessions when the decoder stops
_ADMITTED_SHARE = 8  # in lockstep, requests are admitted once an eighth of all sequences is free
_PATIENCE = 1.5  # mean round trips to wait for steps under way

_Pairs = Sequence[tuple[Generation, Branch]]


class Decoder:
    """Answers generation requests. All methods belong to the event loop it was made on.

    Args:
        head: the PLM's LM head, on the device where distributions are computed.
        eos: tokens that end an answer.
        max_sequences: answers at a time; beam search counts every beam.
        lockstep: choose only when no step is under way, and send all branches in one message. Answers then do not
            depend on timing, to the last bit unless they draft or wait for slots that others hold, and requests wait
            for room; offline stages decode this way. A service chooses for what has arrived, and rejects requests
            beyond `max_sequences`.
        threads: CPU threads of torch for choosing tokens; 0 takes torch's default.
        max_sessions: limit of the PLM owner. Beam searches together stay within it, else they would block each other.

    Attributes:
        predictors, memories: by adapter name; drafts come from the memory of that name. May be replaced at any time:
            answers that have begun keep theirs.
    """

    def __init__(
        self,
        client: PLMClient,
        head: LMHead,
        tokenizer: PLMTokenizer,
        eos: Sequence[int],
        max_sequences: int = 256,
        lockstep: bool = False,
        threads: int = 0,
        max_sessions: int = 2**31 - 1,
    ) -> None:
        self.head, self._client, self._tokenizer = head, client, tokenizer
        self._max_sequences, self._max_sessions, self._lockstep = max_sequences, max_sessions, lockstep
        self._chooser = Chooser(head, eos)
        self.predictors: Mapping[str, Predictor] = {}
        self.memories: Mapping[str, MemoryLookup] = {}
        self._openings = asyncio.Semaphore(_CONCURRENT_OPENINGS)
        self._thread = compute_thread()
        self._thread.submit(set_threads, threads)
        self._waiting: deque[Generation] = deque()
        self._live: set[Generation] = set()
        self._in_flight, self._trip_seconds = 0, 0.0
        self._arrived: list[Generation] = []
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.create_task(self._serve(), name="decoder")

    # ── public ──────────────────────────────────────────────────────────────

    @property
    def live(self) -> int:
        """Answers that are being generated."""
        return len(self._live)

    @property
    def counts(self) -> Counter[str]:
        """Tokens, draft tokens, accepted ones, round trips, replays, busy answers."""
        return self._chooser.counts

    def use_metrics(self, metrics: Metrics) -> None:
        """Report to these metrics from now on."""
        self._chooser.metrics = metrics

    def allow_plm_drafts(self, longest: int) -> None:
        """Let the PLM owner draft up to `longest` tokens at a time, where round trips are long."""
        self._chooser.longest_plm_draft = longest

    def check_health(self) -> None:
        """Raise when the loop that generates answers has ended."""
        if self._loop.done():
            raise RuntimeError("the decoder has stopped")

    async def stop(self) -> None:
        """Abort all answers, close their sessions and end."""
        self._loop.cancel()
        for generation in self._live:
            self._close([branch.session for branch in generation.branches])
        for task in self._tasks - self._closings:
            task.cancel()
        if self._closings:
            await asyncio.wait(self._closings, timeout=_CLOSING_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._loop, *self._tasks, return_exceptions=True)
        for generation in [*self._live, *self._waiting]:
            generation.out.put_nowait(GenerationAborted("the data owner's service ends"))
        await asyncio.wrap_future(self._thread.submit(int))  # the thread finishes what it is choosing

    async def generate(self, requests: Sequence[GenerationRequest], timeout: float = 900.0) -> list[Answer]:
        """All answers, in the order of their requests.

        Args:
            timeout: seconds without progress after which an answer is given up.

        Raises:
            as `answer`; the first error ends all answers.
        """

        async def one(request: GenerationRequest) -> Answer:
            async with aclosing(self.answer(request, timeout)) as answer:
                return Answer([token async for token in answer])

        tasks = [asyncio.create_task(one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def answer(self, request: GenerationRequest, timeout: float = 300.0) -> AsyncGenerator[Token, None]:
        """The tokens of an answer as they are chosen. A caller that stops iterating frees its sessions at once.

        Beam search yields its tokens when it is over.

        Args:
            timeout: seconds for the whole answer.

        Raises:
            UserError: an unknown adapter, or a prompt that is too long.
            Busy: the decoder is full.
            GenerationAborted: the PLM owner was busy or gone until the time was over.
        """
        if self._loop.done():
            raise GenerationAborted("the decoder has stopped")
        generation = self._begin(request, timeout)
        if self._lockstep:
            self._waiting.append(generation)
            self._wake.set()
        else:
            beams = sum(g.width for g in [*self._live, generation] if g.beams is not None)
            crowded = generation.beams is not None and beams > self._max_sessions
            if crowded or self._sequences + generation.width > self._max_sequences:
                raise Busy(f"{self._sequences} answers are being generated, the limit of this service; retry later")
            self._live.add(generation)
            generation.start()
            self._send_alone(generation, generation.branches)
        try:
            started, metric = time.monotonic(), "first_token_seconds"
            while True:
                token = await self._next(generation, timeout)
                now = time.monotonic()
                self._chooser.metrics.observe(metric, now - started)
                started, metric = now, "token_seconds"
                yield token
                if token.finish is not None:
                    return
        finally:
            self._end(generation)

    async def _next(self, generation: Generation, timeout: float) -> Token:
        seconds = None if self._lockstep else max(generation.deadline - time.monotonic(), 0.001)
        try:
            async with asyncio.timeout(seconds):
                token = await generation.out.get()
        except TimeoutError:
            raise GenerationAborted(f"the answer was not finished within {timeout:g} seconds") from None
        if isinstance(token, Exception):
            raise token
        return token

    # ── beginning and ending ────────────────────────────────────────────────

    @property
    def _sequences(self) -> int:
        return sum(generation.width for generation in self._live)

    def _begin(self, request: GenerationRequest, timeout: float) -> Generation:
        if not request.prompt:
            raise UserError("A prompt needs at least one token.")
        if request.adapter is not None and request.adapter not in self.predictors:
            names = ", ".join(self.predictors) or "none"
            raise UserError(f"There is no adapter '{request.adapter}'; loaded are: {names}.")
        predictor = None if request.adapter is None else self.predictors[request.adapter]
        beams = BeamSearch(request.sampling) if request.sampling.kind == "beam" else None
        if beams is not None and beams.width > self._max_sessions:
            raise UserError(f"{beams.width} beams: the PLM owner allows {self._max_sessions} sessions at a time.")
        lookup = memory = None
        if request.draft and beams is None and not (predictor is not None and predictor.looks_back):
            lookup, memory = PromptLookup(request.prompt), self.memories.get(request.adapter or "")
        branch = Branch(list(request.prompt), len(request.prompt), AnswerText(self._tokenizer, request.stop))
        rng = random_stream(request.sampling.seed, request.stream)
        return Generation(request, predictor, [branch], lookup, memory, rng, timeout, beams)

    def _end(self, generation: Generation) -> None:
        generation.closed = True
        self._live.discard(generation)
        with suppress(ValueError):
            self._waiting.remove(generation)
        for trip in generation.trips:
            trip.cancel()
        self._close([*generation.ended, *(branch.session for branch in generation.branches)])
        self._wake.set()

    def _admit(self) -> list[tuple[Generation, Branch]]:
        """In lockstep: admit waiting requests, several at a time, as one pass for many prompts costs little more."""
        admitted: list[tuple[Generation, Branch]] = []
        room = self._max_sequences - self._sequences
        if self._live and room < min(len(self._waiting), self._max_sequences // _ADMITTED_SHARE):
            return admitted
        while self._waiting and (not self._live or self._sequences + self._waiting[0].width <= self._max_sequences):
            generation = self._waiting.popleft()
            self._live.add(generation)
            generation.start()
            admitted += [(generation, branch) for branch in generation.branches]
        return admitted

    # ── round trips ─────────────────────────────────────────────────────────

    def _spawn(self, work: Coroutine[Any, Any, None], *groups: set[asyncio.Task[None]]) -> None:
        """Run in the background, as a member of these groups until it is done."""
        task = asyncio.create_task(work, context=Context())  # it may outlive the request that started it
        for group in (self._tasks, *groups):
            group.add(task)
            task.add_done_callback(group.discard)

    def _send(self, pairs: _Pairs, *groups: set[asyncio.Task[None]]) -> None:
        for generation, _ in pairs:
            generation.in_flight += 1
        self._spawn(self._round_trip(pairs), *groups)

    def _send_forks_apart(self, pairs: _Pairs) -> None:
        """Send forked beams in messages of their own: they may wait for slots, and no other answer should."""
        if continuing := [(generation, branch) for generation, branch in pairs if branch.sent]:
            self._send(continuing)
        forks: dict[Generation, list[Branch]] = {}
        for generation, branch in pairs:
            if not branch.sent:
                forks.setdefault(generation, []).append(branch)
        for generation, branches in forks.items():
            self._send_alone(generation, branches)

    def _send_alone(self, generation: Generation, branches: Sequence[Branch]) -> None:
        """A round trip that is cancelled when its answer ends."""
        self._send([(generation, branch) for branch in branches], generation.trips)

    async def _round_trip(self, pairs: _Pairs) -> None:
        if any(branch.sent for _, branch in pairs):
            outcomes = await self._timed_step(pairs)
        elif self._lockstep or any(generation.holds_slots for generation, _ in pairs):
            outcomes = await self._step(pairs)
        else:
            async with self._openings:
                outcomes = await self._step(pairs)
        self.counts["round_trips"] += 1
        for (generation, branch), outcome in zip(pairs, outcomes, strict=True):
            self._receive(generation, branch, outcome)
        self._wake.set()

    async def _timed_step(self, pairs: _Pairs) -> list[Stepped | Exception]:
        sent = sum(1 + len(branch.draft_tokens) for _, branch in pairs)
        drafted = max(branch.draft.by_plm for _, branch in pairs)
        started = time.perf_counter()
        self._in_flight += 1
        try:
            outcomes = await self._step(pairs)
        finally:
            self._in_flight -= 1
            seconds = time.perf_counter() - started
            self._trip_seconds = 0.8 * self._trip_seconds + 0.2 * seconds
        if all(isinstance(outcome, Stepped) for outcome in outcomes):
            self._chooser.draft_length.record_latency(seconds, sent, drafted)
        return outcomes

    async def _step(self, pairs: _Pairs) -> list[Stepped | Exception]:
        try:
            return await self._client.step([self._next_step(generation, branch) for generation, branch in pairs])
        except (Busy, OSError) as error:
            return [Busy(str(error), getattr(error, "retry_after", 0.2))] * len(pairs)
        except Exception as error:  # of the whole line
            if self._lockstep:
                return [error] * len(pairs)
            logger.error("the PLM owner rejects this service: %s", error)
            return [GenerationAborted("the PLM owner rejects this service")] * len(pairs)

    def _next_step(self, generation: Generation, branch: Branch) -> Step:
        """No answer waits for a slot while it holds others, nor while the other answers wait for it."""
        waits = not generation.holds_slots and (generation.unopened is not None or not self._lockstep)
        prefix = None if generation.predictor is None else generation.predictor.prefix
        return branch.next_step(generation.prompt_from, waits, "" if prefix is None else prefix.name)

    def _receive(self, generation: Generation, branch: Branch, outcome: Stepped | Exception) -> None:
        generation.in_flight -= 1
        if generation.closed:
            self._close([branch.session])  # this step may have reopened it
        elif isinstance(outcome, Stepped):
            self.counts["received_rows"] += len(outcome.state_NH)
            branch.receive(outcome)
            if all(b.sent for b in generation.branches):
                generation.unopened = None
            if not generation.in_flight and all(b.state_NH is not None for b in generation.branches):
                self._arrived.append(generation)
        elif isinstance(outcome, SessionLost):
            self._replay(generation, branch)
        elif isinstance(outcome, Busy | OSError):  # the session is unchanged: repeat the step
            self.counts["busy"] += 1
            if not branch.sent:
                generation.unopened = outcome
            if branch.sent or generation.beams is None:
                self._retry(generation, [branch], getattr(outcome, "retry_after", 0.2), str(outcome))
        else:
            generation.out.put_nowait(outcome)
        if generation.beams is not None and generation.unopened is not None and not generation.in_flight:
            self._release(generation, generation.unopened)

    def _replay(self, generation: Generation, branch: Branch) -> None:
        """Open a lost session again with all its ids."""
        self._close([branch.reopen()])
        generation.unopened = SessionLost("the PLM owner lost the session")
        branch.replays += 1
        self.counts["replays"] += 1
        if branch.replays > _REPLAYS:
            generation.out.put_nowait(GenerationAborted("the PLM owner loses this session every time"))
        elif generation.beams is None:  # beams are opened again together
            self._retry(generation, [branch], 0.05 * 2 ** (branch.replays - 1), str(generation.unopened))

    def _release(self, generation: Generation, reason: Exception) -> None:
        """Free the slots of a beam search that lacks some, and wait for all: two such searches would deadlock."""
        if generation.closed:
            return
        # also sessions that seem unopened: the answer to their opening may have been lost
        self._close([branch.reopen() for branch in generation.branches])
        self._retry(generation, generation.branches, getattr(reason, "retry_after", 0.2), str(reason))

    def _retry(self, generation: Generation, branches: Sequence[Branch], pause: float, reason: str) -> None:
        if time.monotonic() > generation.deadline:
            generation.out.put_nowait(GenerationAborted(f"the PLM owner did not answer in time: {reason}"))
            return

        async def later() -> None:
            try:
                await asyncio.sleep(max(pause, _SHORTEST_PAUSE))
            finally:
                generation.in_flight -= len(branches)
            if not generation.closed:
                self._send_alone(generation, branches)

        generation.in_flight += len(branches)
        self._spawn(later(), generation.trips)

    def _close(self, sessions: Sequence[str]) -> None:
        async def close() -> None:
            with suppress(Exception):  # the PLM owner drops idle sessions anyway
                await self._client.close(sessions)

        if sessions:
            self._spawn(close(), self._closings)

    # ── the loop ────────────────────────────────────────────────────────────

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            await (self._await_all() if self._lockstep else self._await_steps())
            batch = [generation for generation in self._arrived if not generation.closed]
            self._arrived = []
            continuing: list[tuple[Generation, Branch]] = []
            if batch:
                try:
                    results = await loop.run_in_executor(self._thread, self._chooser.choose, batch)
                except Exception as error:
                    results = [error] * len(batch)
                for generation, tokens in zip(batch, results, strict=True):
                    continuing += self._deliver(generation, tokens)
            if self._lockstep:
                continuing += self._admit()
            if not self._lockstep:
                self._send_forks_apart(continuing)
            elif continuing:
                self._send(continuing)

    def _deliver(self, generation: Generation, tokens: list[Token] | Exception) -> _Pairs:
        """Hand out an answer's tokens; returns the branches that continue."""
        if isinstance(tokens, Exception):
            generation.out.put_nowait(tokens)
            return []
        if self._lockstep:  # the timeout counts from the last progress
            generation.start()
        for token in tokens:
            generation.out.put_nowait(token)
        if generation.closed or (tokens and tokens[-1].finish is not None):
            self._live.discard(generation)  # frees its room before the caller has read the last token
            generation.ended += [branch.session for branch in generation.branches]
            generation.branches = []
        self._close(generation.ended)
        generation.ended = []
        return [(generation, branch) for branch in generation.branches]

    async def _await_all(self) -> None:
        """Wait until no branch is under way, except those of answers that wait for a slot."""
        while any(generation.in_flight and generation.unopened is None for generation in self._live):
            await self._wake.wait()
            self._wake.clear()

    async def _await_steps(self) -> None:
        """Wait for steps under way, but not for openings: one message for all costs the PLM little more than one, and
        two alternating halves would each wait for the other's forward pass."""
        if not self._arrived:
            return
        end = time.perf_counter() + _PATIENCE * self._trip_seconds
        while self._in_flight and (seconds := end - time.perf_counter()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            self._wake.clear()
