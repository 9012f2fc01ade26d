"""From examples to rows, in either context. B sequences, N rows, H hidden.

For a prompt of p tokens and a target of t, the rows are the representations at positions p-1 … p+t-1, paired
with the target's tokens and then EOS (paper section 3.2; the published code stores no EOS row).

- `teacher_forced`: of prompt and gold target, one pass a batch.
- `generated`: of the prompt and the PLM's own greedy continuation, as published: the PLM owner sees no target.
  A continuation ends at its EOS (the published code goes on, and stores junk).

A plan may include rows of the prompt, for adapters that look back: (representation, the prompt's next token) at
negative positions, -1 being the one before the target's first row.

The content of requests depends on the shard alone; their timing also on other shards in flight.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, PLMClient, SessionLost, Step, Stepped
from pema_ray.memory.codec import KeyDtype, Keys, encode
from pema_ray.memory.plan import ShardPlan, Weights, first_position, plan_batches
from pema_ray.memory.shards import MemoryRows
from pema_ray.tasks import EncodedPair

_REPLAYS = 20
_CHUNK = 16  # draft tokens per step; those past EOS are wasted


class Extractor(Protocol):
    """The part of a `PLMClient` that a teacher-forced build needs."""

    async def extract(self, batch: ExtractBatch) -> torch.Tensor: ...

    async def end(self) -> None: ...


class BlockingExtractor:
    """An `Extractor` of a plain function that takes whole sequences, without a prefix."""

    def __init__(self, function: Callable[[ExtractBatch], torch.Tensor]) -> None:
        self._function = function

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        sequences = [[*batch.prefix, *ids] for ids in batch.token_ids]
        first = [len(batch.prefix) + first for first in batch.first]
        return self._function(ExtractBatch(sequences, first))

    async def end(self) -> None:
        """Nothing to release."""


async def rows_of_shard(
    plm: Extractor,
    shard: ShardPlan,
    eos: int,
    key_dtype: KeyDtype,
    max_batch_tokens: int,
    window: asyncio.Semaphore | None = None,
) -> tuple[MemoryRows, int, int]:
    """A shard's rows, teacher-forced, in the order of its examples.

    Args:
        window: limits the requests in flight, including those of other shards; None: one at a time.

    Returns:
        The rows, and the token positions computed beyond the shared prefix, without and with padding.
    """
    window, prefix = window or asyncio.Semaphore(1), shard.prefix
    batches = list(plan_batches(shard.examples, max_batch_tokens, len(prefix)))

    async def rows_of(batch: Sequence[EncodedPair]) -> MemoryRows:
        first = [first_position(example, shard.prompt_from) for example in batch]
        inputs = [(e.prompt + (e.target if shard.eos_row else e.target[:-1]))[len(prefix) :] for e in batch]
        request = ExtractBatch(inputs, [position - len(prefix) for position in first], prefix)
        async with window:
            state_NH = await plm.extract(request)
        counts = [len(e.target) + shard.eos_row for e in batch]
        return await asyncio.to_thread(
            lambda: _pair(encode(state_NH.float().numpy(), key_dtype), batch, eos, counts, first)
        )

    requests = [asyncio.ensure_future(rows_of(batch)) for batch in batches]
    try:
        parts = await asyncio.gather(*requests)
    finally:
        for request in requests:
            request.cancel()
    tokens, padded = 0, 0
    for batch in batches:
        lengths = [len(e.prompt) + len(e.target) - (not shard.eos_row) - len(prefix) for e in batch]
        tokens += sum(lengths)
        padded += max(lengths) * len(lengths)
    return _in_order(MemoryRows.concatenate(parts), shard), tokens, padded


def _pair(
    keys: Keys, batch: Sequence[EncodedPair], eos: int, counts: Sequence[int], first: Sequence[int] | None = None
) -> MemoryRows:
    """Pair representations with each example's first `counts` gold tokens, after those of its prompt.

    Args:
        first: the prompt's first token that has a row; by default its last.
    """
    prompt_rows = [0] * len(batch)
    if first is not None:
        prompt_rows = [len(e.prompt) - 1 - f for e, f in zip(batch, first, strict=True)]
    parts = list(zip(batch, counts, prompt_rows, strict=True))
    targets = [np.array([*e.prompt[len(e.prompt) - b :], *[*e.target, eos][:n]], np.int32) for e, n, b in parts]
    return MemoryRows(
        key=keys,
        target=np.concatenate(targets),
        example_id=np.concatenate([np.full(n + b, e.example_id, np.int64) for e, n, b in parts]),
        position=np.concatenate([np.arange(-b, n, dtype=np.int32) for _, n, b in parts]),
    )


def _in_order(rows: MemoryRows, shard: ShardPlan) -> MemoryRows:
    rank = {example.example_id: number for number, example in enumerate(shard.examples)}
    return rows.take(np.argsort([rank[example] for example in rows.example_id.tolist()], kind="stable"))


def weighted(rows: MemoryRows, weights: Weights) -> MemoryRows:
    """Give every row its weight, and remove rows of weight 0.

    Args:
        weights: of the examples whose rows do not all occur once.
    """
    ids_and_positions = zip(rows.example_id.tolist(), rows.position.tolist())
    weight = np.array([weights[e][p] if e in weights else 1 for e, p in ids_and_positions], np.int32)
    return replace(rows, weight=weight).take(weight > 0)


# ── the generated context ───────────────────────────────────────────────────


@dataclass(slots=True)
class _Continuation:
    """One example's session: the PLM's tokens after its prompt, and the states before, between and after them."""

    example: EncodedPair
    session: str
    tokens: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    is_open: bool = False
    """The PLM owner has the session."""

    def step(self, chunk: int, alone: bool) -> Step:
        """The next chunk. It recomputes the last token so far, so that no LM head is needed here."""
        ids = [*self.example.prompt, *self.tokens]
        draft = min(chunk, len(self.example.target) - len(self.tokens))
        position = len(ids) - 1 if self.is_open else 0
        return Step(self.session, position, ids[position:], 1, draft, waits=alone or self.is_open)

    def add(self, answer: Stepped) -> None:
        repeated = 1 if self.states else 0  # the first state of a later chunk is the last of the previous one
        self.states += list(answer.state_NH[repeated:])
        self.tokens += answer.drafted
        self.is_open = True

    def is_done(self, eos: Sequence[int]) -> bool:
        return len(self.tokens) >= len(self.example.target) or any(token in eos for token in self.tokens)

    def rows(self, eos: Sequence[int]) -> list[torch.Tensor]:
        """The states up to the one before the PLM's EOS."""
        count = next((n for n, token in enumerate(self.tokens) if token in eos), len(self.tokens))
        return self.states[: count + 1]


async def generated_rows_of_shard(
    plm: PLMClient, shard: ShardPlan, eos: Sequence[int], key_dtype: KeyDtype, sequences: int
) -> tuple[MemoryRows, int]:
    """A shard's rows from the PLM's own greedy continuations, in the order of its examples.

    Every message advances all running sessions by one chunk; a finished session makes room for the next example. A
    lost session is reopened with all its tokens so far. A session that gets no slot, because other clients have them,
    is opened again when one of this shard's sessions ends.

    Args:
        eos: ids that end a continuation; the first is the target of EOS rows.
        sequences: maximum number of sequences decoded together.

    Returns:
        The rows, and the token positions computed beyond the prompts' shared prefix.
    """
    limits = (await plm.describe()).limits
    chunk = max(1, min(_CHUNK, limits.max_draft))
    sequences = max(1, min(sequences, limits.max_steps, limits.max_sessions, limits.max_rows // (1 + chunk)))
    limit, lost = sequences, 0  # lost: consecutive messages that lost a session
    name = uuid.uuid4().hex
    continuations = [_Continuation(example, f"{name}/{number}") for number, example in enumerate(shard.examples)]
    waiting = sorted(continuations, key=lambda c: (len(c.example.target), c.example.example_id), reverse=True)
    running: list[_Continuation] = []
    try:
        while running or waiting:
            while waiting and len(running) < limit:
                running.append(waiting.pop())
            answers = await plm.step([continuation.step(chunk, len(running) == 1) for continuation in running])
            lost = lost + 1 if any(isinstance(answer, SessionLost) for answer in answers) else 0
            if lost > _REPLAYS:
                raise UserError(
                    "The PLM owner loses sessions every time: it has fewer slots than are decoded together."
                )
            await asyncio.sleep(min(1.0, 0.05 * 2**lost) if lost else 0)
            unfinished, finished = [], []
            for continuation, answer in zip(running, answers, strict=True):
                if isinstance(answer, Busy):
                    waiting.append(continuation)
                    continue
                if isinstance(answer, SessionLost):
                    continuation.is_open = False
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    continuation.add(answer)
                (finished if continuation.is_done(eos) else unfinished).append(continuation)
            if finished:
                await plm.close([continuation.session for continuation in finished])
                limit = sequences
            elif len(unfinished) < len(running):  # without a slot: other clients have them
                limit = max(1, len(unfinished))
            running = unfinished
    finally:
        if running:
            with suppress(UserError):  # report the error that ended the build, not this one
                await plm.close([continuation.session for continuation in running])
    states = [continuation.rows(eos) for continuation in continuations]
    exact = torch.stack([state for of_example in states for state in of_example])
    counts = [len(of_example) for of_example in states]
    shared = len(shard.prefix)
    tokens = sum(len(example.prompt) - shared - 1 + n for example, n in zip(shard.examples, counts, strict=True))
    return _pair(encode(exact.float().numpy(), key_dtype), shard.examples, eos[0], counts), tokens
