"""Decodes many sequences together, token by token, over a `Stepper`: Gradual Unrolling as a service.

Every sequence is at a step of its own: it waits for representations from the PLM owner, or for its next token to be
chosen. Whatever has arrived is chosen for together (one product with the LM head for all), and goes on in one message.
A lost session is said again whole; nothing of it shows but time. S sequences, N rows, V vocabulary, H hidden.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from pema_ray.data_owner.adapter import PemaAdapter
from pema_ray.data_owner.generation import choose, random_stream
from pema_ray.data_owner.reading import Reading
from pema_ray.data_owner.serving.drafts import LONGEST_MATCH, MemoryLookup, PromptLookup
from pema_ray.data_owner.serving.orders import Explained, GivenUp, Order, Token
from pema_ray.data_owner.serving.pace import Bet, Pace
from pema_ray.data_owner.serving.text import TextStream
from pema_ray.data_owner.unrolling import mix
from pema_ray.errors import UserError
from pema_ray.line import LMHead, SessionLost
from pema_ray.line.stepping import Busy, Step, Stepped, Stepper
from pema_ray.metrics import Metrics, NoMetrics

logger = logging.getLogger(__name__)
_REPLAYS = 20  # of one sequence without a new token before it is given up
_SHORTEST_PAUSE = 0.05  # seconds between two attempts at a busy PLM owner, which may ask for longer ones
_OPENINGS = 16  # under way at once: those that wait for a slot must not take up the line of those that have one
_LAST_WORDS = 2.0  # seconds to close sessions in, when the service ends
_PATIENCE = 1.5  # round trips, as long as they were lately
_LEAST_TRUSTED = 1e-30  # never nought, which would spare a step that a reading has to take
_MOST_ROWS = 128  # of one product with the LM head


@dataclass(eq=False)
class _Sequence:
    order: Order
    adapter: PemaAdapter | None
    text: TextStream
    drafts: PromptLookup | None
    memory: MemoryLookup | None
    draw: torch.Generator
    deadline: float
    out: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    ids: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    told: int = 0
    """Tokens that the PLM owner has heard and that stand."""
    bet: Bet = field(default_factory=Bet)
    guessed: list[int] = field(default_factory=list)
    """Tokens sent along, or what the PLM has guessed."""
    reading: Reading | None = None
    """Of an adapter that looks back, once the prompt's representations have come."""
    state_NH: torch.Tensor | None = None
    replays: int = 0
    trip: asyncio.Task[None] | None = None
    """The round trip of an opening, which is its own."""
    gone: bool = False

    @property
    def looks_back(self) -> bool:
        return self.adapter is not None and self.adapter.config.looks_back

    @property
    def step(self) -> int:
        """Tokens answered so far: t of the schedule."""
        return len(self.ids) - len(self.order.prompt)


class Unroller:
    """Answers orders. All methods belong to the event loop it was started on.

    Args:
        head: the PLM's LM head, on the device where distributions are computed.
        detokenize: token ids → text.
        eos: tokens that end an answer.
        most_live: answers at a time.

    Attributes:
        adapters, memories: by name; the memory of an adapter's name is what its answers are guessed from. May be
            replaced at any time: answers that have begun keep theirs.
        most_drafted: tokens that the PLM owner may be asked to guess at a time.
        pace: decides how far to guess.
    """

    def __init__(
        self,
        stepper: Stepper,
        head: LMHead,
        detokenize: Callable[[Sequence[int]], str],
        eos: Sequence[int],
        most_live: int = 256,
    ) -> None:
        self._most_live, self._openings = most_live, asyncio.Semaphore(_OPENINGS)
        self.head, self._stepper, self._detokenize, self._eos = head, stepper, detokenize, frozenset(eos)
        self.adapters: Mapping[str, PemaAdapter] = {}
        self.memories: Mapping[str, MemoryLookup] = {}
        self.most_drafted = 0
        self.pace = Pace()
        self.metrics: Metrics = NoMetrics()
        self.counts: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unroller")
        self._arrived: list[_Sequence] = []
        self._flying, self._trip = 0, 0.0
        self._wake = asyncio.Event()
        self._sequences: set[_Sequence] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.create_task(self._serve(), name="unroller")

    @property
    def live(self) -> int:
        """Answers that are being made."""
        return len(self._sequences)

    def check_health(self) -> None:
        """Raises when the loop that makes answers has ended."""
        if self._loop.done():
            raise RuntimeError("the unroller has stopped")

    async def stop(self) -> None:
        """End; answers that are being made are given up, and the PLM owner is told so."""
        self._loop.cancel()
        for sequence in self._sequences:
            self._close(sequence.session)
        for task in self._tasks - self._closings:
            task.cancel()
        if self._closings:
            await asyncio.wait(self._closings, timeout=_LAST_WORDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._loop, *self._tasks, return_exceptions=True)
        for sequence in list(self._sequences):
            sequence.out.put_nowait(GivenUp("the data owner's service ends"))
        self._thread.shutdown(wait=True)

    async def answer(self, order: Order, timeout: float = 300.0) -> AsyncGenerator[Token, None]:
        """The tokens of an answer as they are chosen. Who stops listening gives its slot back at once.

        Args:
            timeout: seconds for the whole answer.

        Raises:
            UserError: an unknown adapter, or a prompt that is too long.
            Busy: as many answers are being made as may be.
            GivenUp: the PLM owner was busy or gone until the time was over.
        """
        if len(self._sequences) >= self._most_live:
            raise Busy(f"{len(self._sequences)} answers are being made, which is as many as may be; come again")
        sequence = self._begin(order, time.monotonic() + timeout)
        self._sequences.add(sequence)
        try:
            sequence.trip = self._send([sequence])
            before, what = time.monotonic(), "first_token_seconds"
            while True:
                left = sequence.deadline - time.monotonic()
                try:
                    async with asyncio.timeout(max(left, 0.001)):
                        got = await sequence.out.get()
                except TimeoutError:
                    raise GivenUp(f"the answer was not finished within {timeout:g} seconds") from None
                if isinstance(got, Exception):
                    raise got
                now = time.monotonic()
                self.metrics.observe(what, now - before)
                before, what = now, "token_seconds"
                yield got
                if got.finish is not None:
                    return
        finally:
            sequence.gone = True
            self._sequences.discard(sequence)
            if sequence.trip is not None:
                sequence.trip.cancel()
            self._close(sequence.session)

    def _begin(self, order: Order, deadline: float) -> _Sequence:
        if order.adapter is not None and order.adapter not in self.adapters:
            raise UserError(f"There is no adapter '{order.adapter}'; there are {', '.join(self.adapters) or 'none'}.")
        adapter = None if order.adapter is None else self.adapters[order.adapter]  # held until the answer is finished
        guesses = memory = None
        if order.draft and not (adapter is not None and adapter.config.looks_back):  # it reads one token after another
            guesses, memory = PromptLookup(order.prompt), self.memories.get(order.adapter or "")
        draw = random_stream(order.decoding.seed, order.seed_stream)
        text = TextStream(self._detokenize, order.stop)
        return _Sequence(order, adapter, text, guesses, memory, draw, deadline, ids=list(order.prompt))

    # ── round trips ─────────────────────────────────────────────────────────

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, context=Context())  # not the request's: it may be over, this goes on
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, sequences: Sequence[_Sequence]) -> asyncio.Task[None]:
        return self._spawn(self._round_trip(list(sequences)))

    async def _round_trip(self, sequences: list[_Sequence]) -> None:
        if any(not sequence.told for sequence in sequences):
            async with self._openings:
                outcomes = await self._step(sequences)
        else:
            tokens, drafted = sum(1 + len(s.guessed) for s in sequences), max(s.bet.draft for s in sequences)
            started = time.perf_counter()
            self._flying += 1
            try:
                outcomes = await self._step(sequences)
            finally:
                self._flying -= 1
                took = time.perf_counter() - started
                self._trip = 0.8 * self._trip + 0.2 * took
            if all(isinstance(outcome, Stepped) for outcome in outcomes):
                self.pace.took(took, tokens, drafted)
        self.counts["round_trips"] += 1
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            if sequence.gone:
                self._close(sequence.session)  # it may just have been opened again
            elif isinstance(outcome, Stepped):
                sequence.told = len(sequence.ids)
                if outcome.drafted:
                    sequence.guessed = list(outcome.drafted)
                sequence.bet = replace(sequence.bet, draft=0)
                sequence.state_NH, sequence.replays = outcome.state_NH, 0
                self._arrived.append(sequence)
            elif isinstance(outcome, SessionLost):
                self._replay(sequence)
            elif isinstance(outcome, Busy):  # a step may be said twice: the session stays as it is
                self.counts["busy"] += 1
                self._later(sequence, outcome.retry_after)
            else:
                sequence.out.put_nowait(outcome)
        self._wake.set()

    async def _step(self, sequences: Sequence[_Sequence]) -> list[Stepped | Exception]:
        try:
            return await self._stepper.step([self._next_step(sequence) for sequence in sequences])
        except (Busy, OSError) as error:
            return [Busy(str(error), getattr(error, "retry_after", 0.2))] * len(sequences)
        except Exception as error:  # of the line as a whole: no fault of any answer
            logger.error("the PLM owner refuses this service: %s", error)
            return [GivenUp("the PLM owner refuses this service")] * len(sequences)

    def _replay(self, sequence: _Sequence) -> None:
        """Say a lost session again, whole and under another name."""
        self._close(sequence.session)
        sequence.told, sequence.guessed, sequence.bet = 0, [], Bet()
        sequence.session = uuid.uuid4().hex
        sequence.replays += 1
        self.counts["replays"] += 1
        if sequence.replays > _REPLAYS:
            sequence.out.put_nowait(GivenUp("the PLM owner loses this session every time"))
        else:
            self._later(sequence, 0.05 * 2 ** (sequence.replays - 1))

    def _later(self, sequence: _Sequence, pause: float) -> None:
        async def later() -> None:
            await asyncio.sleep(max(pause, _SHORTEST_PAUSE))
            if not sequence.gone:
                await self._round_trip([sequence])

        sequence.trip = self._spawn(later())

    def _next_step(self, sequence: _Sequence) -> Step:
        tokens = [*sequence.ids[sequence.told :], *sequence.guessed]
        states = 1 + len(sequence.guessed)
        if sequence.looks_back and sequence.reading is None:
            assert sequence.adapter is not None
            states = len(tokens) - min(sequence.adapter.config.prompt_from, len(tokens) - 1)
        return Step(sequence.session, sequence.told, tokens, states, sequence.bet.draft)

    def _close(self, session: str) -> None:
        task = self._spawn(self._forget(session))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    async def _forget(self, session: str) -> None:
        with suppress(Exception):  # a PLM owner that is gone forgets by itself
            await self._stepper.close([session])

    # ── choosing ────────────────────────────────────────────────────────────

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._arrived:
                await self._gather()
            batch = [sequence for sequence in self._arrived if not sequence.gone]
            self._arrived = []
            if not batch:
                continue
            try:
                chosen = await loop.run_in_executor(self._thread, self._choose, batch)
            except Exception as error:
                for sequence in batch:
                    sequence.out.put_nowait(error)
                continue
            on: list[_Sequence] = []
            for sequence, tokens in zip(batch, chosen, strict=True):
                if isinstance(tokens, Exception):
                    sequence.out.put_nowait(tokens)
                    continue
                for token in tokens:
                    sequence.out.put_nowait(token)
                if not sequence.gone and tokens[-1].finish is None:
                    sequence.trip = None
                    on.append(sequence)
            if on:
                self._send(on)

    async def _gather(self) -> None:
        """Wait for those who are on their way, but for openings: all in one message cost the PLM little more than one.

        Two halves that took turns would each wait for the other's forward pass.
        """
        end = time.perf_counter() + _PATIENCE * self._trip
        while self._flying and (left := end - time.perf_counter()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()
            self._wake.clear()

    def _choose(self, batch: Sequence[_Sequence]) -> list[list[Token] | Exception]:
        """The next tokens of every sequence, `_MOST_ROWS` states at a time, and what each sends along with them."""
        self._read_prompts(batch)
        found: list[list[Token] | Exception] = []
        part: list[_Sequence] = []
        rows = 0
        for sequence in batch:
            held = 0 if sequence.state_NH is None else len(sequence.state_NH)
            if part and rows + held > _MOST_ROWS:
                found += self._choose_together(part)
                part, rows = [], 0
            part.append(sequence)
            rows += held
        found += self._choose_together(part)
        self._bet([s for s, t in zip(batch, found, strict=True) if isinstance(t, list) and t[-1].finish is None])
        return found

    @torch.inference_mode()
    def _read_prompts(self, batch: Sequence[_Sequence]) -> None:
        """Let adapters that look back take in the prompts of sequences that begin."""
        for sequence in batch:
            if sequence.looks_back and sequence.reading is None and sequence.state_NH is not None:
                assert sequence.adapter is not None
                sent: Any = _Sent(sequence.state_NH)
                sequence.reading = sequence.adapter.begin(sent, [sequence.ids], self.head, alone=True)
                sequence.state_NH = sequence.state_NH[-1:]

    def _bet(self, going_on: Sequence[_Sequence]) -> None:
        """Decide what every sequence guesses next."""
        offers = []
        for sequence in going_on:
            sequence.bet, sequence.guessed = Bet(), []
            order, guesses = sequence.order, []
            most = min(order.draft, order.max_new_tokens - sequence.step - 1)
            if sequence.drafts is None or most < 1:
                offers.append(([], 0, 0))
                continue
            guesses = sequence.drafts.guesses(most)
            if sequence.memory is not None:
                guesses += sequence.memory.guesses(sequence.ids[len(order.prompt) :][-LONGEST_MATCH:], most)
            offers.append((guesses, most, min(most, self.most_drafted)))
        if any(most for _, most, _ in offers):
            for sequence, bet in zip(going_on, self.pace.choose(offers), strict=True):
                sequence.bet, sequence.guessed = bet, list(bet.tokens)

    @torch.inference_mode()
    def _choose_together(self, batch: Sequence[_Sequence]) -> list[list[Token] | Exception]:
        """As many tokens of each sequence as its guesses came true, and one more."""
        device = self.head.weight.device
        counts = [0 if s.state_NH is None else len(s.state_NH) for s in batch]
        state_NH = torch.cat([s.state_NH for s in batch if s.state_NH is not None]).to(device)
        lam_N = self._lam(batch, counts, state_NH)
        lam = lam_N.tolist()
        asks = torch.tensor([s.order.explain for s, n in zip(batch, counts, strict=True) for _ in range(n)])
        log_plm = log_pema = None
        if bool((asks | (lam_N < 1)).any()):
            log_plm = self.head.log_probs(self.head.norm(state_NH))
        if bool((asks | (lam_N > 0)).any()):
            log_pema = self._pema(batch, counts, state_NH, asks | (lam_N > 0))
        if log_plm is None or log_pema is None:
            log_p = log_plm if log_pema is None else log_pema
            assert log_p is not None
        else:
            log_p = mix(log_pema, log_plm, lam_N)
        found: list[list[Token] | Exception] = []
        begin = 0
        for sequence, n in zip(batch, counts, strict=True):
            rows = slice(begin, begin + n)
            pema, plm = (None if log is None else log[rows] for log in (log_pema, log_plm))
            try:
                found.append(self._follow(sequence, log_p[rows], lam[rows], pema, plm))
            except Exception as error:  # one answer's own fault
                found.append(error)
            begin += n
        return found

    def _lam(self, batch: Sequence[_Sequence], counts: Sequence[int], state_NH: torch.Tensor) -> torch.Tensor:
        """λ of every state `[N]`: the schedule's, times how far the adapter trusts itself where it says so."""
        lam = []
        for s, n in zip(batch, counts, strict=True):
            schedule, length = s.order.schedule, s.order.length
            lam += [0.0 if s.adapter is None else schedule.at(s.step + i, length) for i in range(n)]
        lam_N = torch.tensor(lam)
        whose = [s.adapter for s, n in zip(batch, counts, strict=True) for _ in range(n)]
        for adapter in dict.fromkeys(a for a in whose if a is not None and a.config.predicts_lambda):
            rows = torch.tensor([a is adapter for a in whose])
            trusted = adapter.trusted(state_NH[rows], self.head).cpu()
            lam_N[rows] *= trusted.clamp_min(_LEAST_TRUSTED)
        return lam_N

    def _pema(
        self, batch: Sequence[_Sequence], counts: Sequence[int], state_NH: torch.Tensor, wanted_N: torch.Tensor
    ) -> torch.Tensor:
        """float32 log P_PEMA alone `[N, V]`, adapter by adapter; zeros where λ is 0 and nobody asks."""
        whose = [sequence.adapter for sequence, n in zip(batch, counts, strict=True) for _ in range(n)]
        alone = list(dict.fromkeys(a for a in whose if a is not None and not a.config.looks_back))
        if len(alone) == 1 and all(a is alone[0] for a in whose):
            return alone[0].log_probs(state_NH, self.head, alone=True)
        found = torch.zeros(len(state_NH), self.head.vocab_size, device=state_NH.device)
        for row, sequence in zip(accumulate(counts, initial=0), batch, strict=False):
            if sequence.reading is not None and bool(wanted_N[row]):
                found[row] = sequence.reading.log_probs(state_NH[row : row + 1])[0]
        for adapter in alone:
            rows = torch.tensor([a is adapter for a in whose]) & wanted_N
            if bool(rows.any()):
                found[rows] = adapter.log_probs(state_NH[rows], self.head, alone=True)
        return found

    def _follow(
        self,
        sequence: _Sequence,
        log_p_NV: torch.Tensor,
        lam_N: Sequence[float],
        log_pema_NV: torch.Tensor | None,
        log_plm_NV: torch.Tensor | None,
    ) -> list[Token]:
        order, tokens, guessed = sequence.order, [], sequence.guessed
        for row in range(len(log_p_NV)):
            (chosen,) = choose(log_p_NV[row : row + 1], order.decoding, [sequence.draw])
            told = sequence.text.push(chosen) if chosen not in self._eos else ""
            finish = self._finished(sequence, chosen)
            explained = None
            if order.explain and log_plm_NV is not None:
                pema = log_plm_NV if sequence.adapter is None or log_pema_NV is None else log_pema_NV
                explained = Explained(
                    lam_N[row],
                    float(pema[row, chosen]),
                    float(log_plm_NV[row, chosen]),
                    _top(pema[row], max(order.top, 5)),
                    _top(log_plm_NV[row], max(order.top, 5)),
                )
            if finish is not None:
                told += sequence.text.finish()
            top = _top(log_p_NV[row], order.top) if order.top else []
            tokens.append(Token(chosen, told, float(log_p_NV[row, chosen]), finish, top, explained))
            sequence.ids.append(chosen)
            self.counts["tokens"] += 1
            if sequence.adapter is not None:
                self.metrics.observe("lambda", lam_N[row])
            if sequence.drafts is not None:
                sequence.drafts.follow(chosen)
            if sequence.reading is not None:
                sequence.reading.follow([0], [chosen])
            if finish is not None or row >= len(guessed) or guessed[row] != chosen:
                break
        accepted = len(tokens) - 1
        self.counts["drafted"] += len(guessed)
        self.counts["accepted"] += accepted
        sequence.told += accepted
        if tokens[-1].finish is None or accepted == len(guessed):  # else nobody knows how far it was right
            self.pace.came_true(sequence.bet.kind, len(guessed), accepted)
        return tokens

    def _finished(self, sequence: _Sequence, token: int) -> Literal["eos", "stop", "length"] | None:
        if token in self._eos:
            return "eos"
        if sequence.text.stopped:
            return "stop"
        return "length" if sequence.step + 1 >= sequence.order.max_new_tokens else None


class _Sent:
    """Representations of a prompt that have come, where an adapter would ask a PLM owner for them."""

    def __init__(self, state_NH: torch.Tensor) -> None:
        self._state_NH = state_NH

    def extract(self, _: Any) -> torch.Tensor:
        return self._state_NH


def _top(log_p_V: torch.Tensor, count: int) -> list[tuple[int, float]]:
    values, places = log_p_V.topk(min(count, len(log_p_V)))
    return list(zip(places.tolist(), values.tolist(), strict=True))
