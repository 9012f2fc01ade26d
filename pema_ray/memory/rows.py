"""From examples to rows, in either context. B sequences, N rows, H hidden.

For a prompt of p tokens and a target of t, the rows are the representations at positions p-1 … p+t-1, paired
with the target's tokens and then EOS (paper section 3.2; the published code stores no EOS row).

- `teacher_forced`: of prompt and gold target, one pass a batch.
- `generated`: of the prompt and the PLM's own greedy continuation, as published: the PLM owner sees no target.
  A continuation that meets its EOS gives no further rows (the published code goes on, and stores junk).

A plan may ask for rows of the prompt too, for adapters that look back: (representation, the prompt's next token) at
negative positions, -1 being the one before the target's first row.

What the PLM is asked depends on the shard alone; when, on the others that are under way.
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
_CHUNK = 16  # tokens drafted at a time: what is decoded past EOS is lost


class Extractor(Protocol):
    """The part of a `PLMClient` that a teacher-forced build needs."""

    async def extract(self, batch: ExtractBatch) -> torch.Tensor: ...

    async def end(self) -> None: ...


class BlockingExtractor:
    """An `Extractor` of a plain function that takes whole sequences, without a prefix."""

    def __init__(self, function: Callable[[ExtractBatch], torch.Tensor]) -> None:
        self._function = function

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        whole = [[*batch.prefix, *ids] for ids in batch.token_ids]
        first = [len(batch.prefix) + first for first in batch.first]
        return self._function(ExtractBatch(whole, first))

    async def end(self) -> None:
        """Nothing is held."""


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
        window: bounds the requests under way, those of other shards included; none: one at a time.

    Returns:
        The rows, and the token positions computed beyond the shared prefix, bare and padded.
    """
    window, prefix = window or asyncio.Semaphore(1), shard.prefix
    batches = list(plan_batches(shard.examples, max_batch_tokens, len(prefix)))

    async def rows_of(batch: Sequence[EncodedPair]) -> MemoryRows:
        first = [first_position(example, shard.prompt_from) for example in batch]
        inputs = [(e.prompt + (e.target if shard.eos_row else e.target[:-1]))[len(prefix) :] for e in batch]
        request = ExtractBatch(inputs, [place - len(prefix) for place in first], prefix)
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
    """Put the first so many of each example's gold tokens beside its representations, after its prompt's own.

    Args:
        first: the prompt's first token that has a row; by default its last.
    """
    before = [0] * len(batch) if first is None else [len(e.prompt) - 1 - f for e, f in zip(batch, first, strict=True)]
    parts = list(zip(batch, counts, before, strict=True))
    targets = [np.array([*e.prompt[len(e.prompt) - b :], *[*e.target, eos][:n]], np.int32) for e, n, b in parts]
    return MemoryRows(
        key=keys,
        target=np.concatenate(targets),
        example_id=np.concatenate([np.full(n + b, e.example_id, np.int64) for e, n, b in parts]),
        position=np.concatenate([np.arange(-b, n, dtype=np.int32) for _, n, b in parts]),
    )


def _in_order(rows: MemoryRows, shard: ShardPlan) -> MemoryRows:
    rank = {example.example_id: place for place, example in enumerate(shard.examples)}
    return rows.take(np.argsort([rank[example] for example in rows.example_id.tolist()], kind="stable"))


def weighted(rows: MemoryRows, weights: Weights) -> MemoryRows:
    """Give every row its weight and leave out those of weight 0.

    Args:
        weights: of the examples whose rows do not all occur once.
    """
    found = [weights[e][p] if e in weights else 1 for e, p in zip(rows.example_id.tolist(), rows.position.tolist())]
    weight = np.array(found, np.int32)
    return replace(rows, weight=weight).take(weight > 0)


# ── the generated context ───────────────────────────────────────────────────


@dataclass(slots=True)
class _Continuation:
    """One example's session: what the PLM said after its prompt, and the state before each of its tokens and after."""

    example: EncodedPair
    session: str
    said: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    is_held: bool = False
    """The PLM owner has the session."""

    def step(self, chunk: int, alone: bool) -> Step:
        """The next chunk. Its last known token is computed once more, so that no LM head is needed here."""
        ids = [*self.example.prompt, *self.said]
        draft = min(chunk, len(self.example.target) - len(self.said))
        position = len(ids) - 1 if self.is_held else 0
        return Step(self.session, position, ids[position:], 1, draft, waits=alone or self.is_held)

    def take(self, answer: Stepped) -> None:
        known = len(self.states) > 0  # the first state of a later chunk is the last of the one before
        self.states += list(answer.state_NH[1 if known else 0 :])
        self.said += answer.drafted
        self.is_held = True

    def is_done(self, eos: Sequence[int]) -> bool:
        return len(self.said) >= len(self.example.target) or any(token in eos for token in self.said)

    def rows(self, eos: Sequence[int]) -> list[torch.Tensor]:
        """The state after each number of tokens, up to that before the PLM's EOS."""
        said = next((n for n, token in enumerate(self.said) if token in eos), len(self.said))
        return self.states[: said + 1]


async def generated_rows_of_shard(
    plm: PLMClient, shard: ShardPlan, eos: Sequence[int], key_dtype: KeyDtype, sequences: int
) -> tuple[MemoryRows, int]:
    """A shard's rows from the PLM's own greedy continuations, in the order of its examples.

    Every message advances all running sessions by one chunk; whoever is done makes room for the next example. A
    session that the PLM owner lost is opened again with all its tokens so far. One that it has no slot for, because
    others hold them, is opened when one of ours is over.

    Args:
        eos: ids that end a continuation; the first is the target of EOS rows.
        sequences: most sequences decoded together.

    Returns:
        The rows, and the token positions computed beyond the prompts' shared prefix.
    """
    limits = (await plm.describe()).limits
    chunk = max(1, min(_CHUNK, limits.max_draft))
    sequences = max(1, min(sequences, limits.max_steps, limits.max_sessions, limits.max_rows // (1 + chunk)))
    room, lost = sequences, 0  # lost: messages in a row that lost a session
    name = uuid.uuid4().hex
    all_of_it = [_Continuation(example, f"{name}/{number}") for number, example in enumerate(shard.examples)]
    waiting = sorted(all_of_it, key=lambda c: (len(c.example.target), c.example.example_id), reverse=True)
    running: list[_Continuation] = []
    try:
        while running or waiting:
            while waiting and len(running) < room:
                running.append(waiting.pop())
            answers = await plm.step([continuation.step(chunk, len(running) == 1) for continuation in running])
            lost = lost + 1 if any(isinstance(answer, SessionLost) for answer in answers) else 0
            if lost > _REPLAYS:
                raise UserError("The PLM owner loses sessions every time: it holds fewer than are decoded together.")
            await asyncio.sleep(min(1.0, 0.05 * 2**lost) if lost else 0)
            going_on, over = [], []
            for continuation, answer in zip(running, answers, strict=True):
                if isinstance(answer, Busy):
                    waiting.append(continuation)
                    continue
                if isinstance(answer, SessionLost):
                    continuation.is_held = False
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    continuation.take(answer)
                (over if continuation.is_done(eos) else going_on).append(continuation)
            if over:
                await plm.close([continuation.session for continuation in over])
                room = sequences
            elif len(going_on) < len(running):  # without a slot: others hold them
                room = max(1, len(going_on))
            running = going_on
    finally:
        if running:
            with suppress(UserError):  # what ended the build is told, not what it entails
                await plm.close([continuation.session for continuation in running])
    found = [continuation.rows(eos) for continuation in all_of_it]
    exact = torch.stack([state for states in found for state in states])
    counts = [len(states) for states in found]
    shared = len(shard.prefix)
    tokens = sum(len(example.prompt) - shared - 1 + n for example, n in zip(shard.examples, counts, strict=True))
    return _pair(encode(exact.float().numpy(), key_dtype), shard.examples, eos[0], counts), tokens
