"""From examples to rows, in either context. B sequences, N rows, H hidden.

For a prompt of p tokens and a target of t, the rows are the representations at positions p-1 … p+t-1, paired
with the target's tokens and then EOS (paper section 3.2; the published code stores no EOS row).

- `teacher_forced`: of prompt and gold target, one pass a batch.
- `generated`: of the prompt and the PLM's own greedy continuation, as published: the PLM owner sees no target.
  A continuation that meets its EOS gives no further rows (the published code goes on, and stores junk).

A plan may ask for rows of the prompt too, for adapters that look back: (representation, the prompt's next token) at
negative positions, -1 being the one before the target's first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from pema_ray.line import ContextSource, DecodingSession, ExtractBatch
from pema_ray.memory.codec import KeyDtype, Keys, encode
from pema_ray.memory.plan import ShardPlan, Weights, common_prompt_prefix, plan_batches
from pema_ray.memory.shards import MemoryRows
from pema_ray.tasks import EncodedPair

_ROOM_FOR_NEWCOMERS = 0.25  # of the sequences must be done before new ones are let in: every admission copies the cache


class Extractor(Protocol):
    """The part of a `ContextSource` that a teacher-forced build needs."""

    def extract(self, batch: ExtractBatch) -> torch.Tensor: ...


def rows_of_batch(
    source: Extractor,
    batch: Sequence[EncodedPair],
    eos: int | None,
    key_dtype: KeyDtype,
    prompt_from: int | None = None,
) -> MemoryRows:
    """All rows of the examples, teacher-forced, example after example.

    Args:
        eos: what follows an example; none: nothing does, its last token is its last row's.
        prompt_from: rows of prompts are wanted too, from this token of theirs on.
    """
    last = [len(example.prompt) - 1 for example in batch]
    first = last if prompt_from is None else [min(prompt_from, place) for place in last]
    inputs = [e.prompt + (e.target[:-1] if eos is None else e.target) for e in batch]
    keys = encode(source.extract(ExtractBatch(inputs, first)).float().numpy(), key_dtype)
    return _pair(keys, batch, eos, [len(e.target) + (eos is not None) for e in batch], first)


def _pair(
    keys: Keys, batch: Sequence[EncodedPair], eos: int | None, counts: Sequence[int], first: Sequence[int] | None = None
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


def rows_of_shard(
    source: Extractor, shard: ShardPlan, eos: int, key_dtype: KeyDtype, max_batch_tokens: int
) -> tuple[MemoryRows, int, int]:
    """A shard's rows, teacher-forced, in the order of its examples.

    Returns:
        The rows, and the token positions computed beyond the shared prefix, bare and padded.
    """
    shared = common_prompt_prefix(shard.examples)
    parts, tokens, padded = [], 0, 0
    for batch in plan_batches(shard.examples, max_batch_tokens, shared):
        parts.append(rows_of_batch(source, batch, eos if shard.eos_row else None, key_dtype, shard.prompt_from))
        lengths = [len(e.prompt) + len(e.target) - (not shard.eos_row) - shared for e in batch]
        tokens += sum(lengths)
        padded += max(lengths) * len(lengths)
    return _in_order(MemoryRows.concatenate(parts), shard), tokens, padded


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


@torch.inference_mode()
def generated_rows_of_shard(
    source: ContextSource, shard: ShardPlan, eos: Sequence[int], key_dtype: KeyDtype, sequences: int
) -> tuple[MemoryRows, int]:
    """A shard's rows from the PLM's own greedy continuations, in the order of its examples.

    Sequences are batched continuously: whoever is done makes room for the next example.

    Args:
        eos: ids that end a continuation; the first is the target of EOS rows.
        sequences: most sequences decoded together.

    Returns:
        The rows, and the token positions computed beyond the prompts' shared prefix.
    """
    head = source.lm_head().head
    states: dict[int, list[torch.Tensor]] = {example.example_id: [] for example in shard.examples}
    waiting = sorted(shard.examples, key=lambda e: (len(e.target), e.example_id), reverse=True)  # popped from its end
    running: list[EncodedPair] = []
    session: DecodingSession | None = None
    try:
        while running or waiting:
            if waiting and len(running) <= (1 - _ROOM_FOR_NEWCOMERS) * sequences:
                new = [waiting.pop() for _ in range(min(sequences - len(running), len(waiting)))]
                prompts = [example.prompt for example in new]
                if session is None:
                    session = DecodingSession(source, prompts)
                else:
                    session.admit(prompts)
                running += new
            assert session is not None
            state_BH = session.state_BH.to(head.weight.device)
            greedy = head.logits(head.norm(state_BH)).argmax(-1).tolist()
            kept: list[int] = []
            for row, (example, token) in enumerate(zip(running, greedy, strict=True)):
                states[example.example_id].append(session.state_BH[row])
                if token not in eos and len(states[example.example_id]) <= len(example.target):
                    kept.append(row)
            running = [running[row] for row in kept]
            if running:
                session.extend(kept, [greedy[row] for row in kept])
            else:
                session.close()
                session = None
    finally:
        if session is not None:
            session.close()
    counts = [len(states[example.example_id]) for example in shard.examples]
    exact = torch.stack([state for example in shard.examples for state in states[example.example_id]])
    shared = common_prompt_prefix(shard.examples)
    tokens = sum(len(example.prompt) - shared - 1 + n for example, n in zip(shard.examples, counts, strict=True))
    return _pair(encode(exact.float().numpy(), key_dtype), shard.examples, eos[0], counts), tokens
