"""From examples to rows: one teacher-forced pass a batch. B sequences, N rows, H hidden.

For a prompt of p tokens and a target of t, the rows are the representations at positions p-1 … p+t-1, paired
with the target's tokens and then EOS (paper section 3.2; the published code stores no EOS row).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from pema_ray.line import ExtractBatch
from pema_ray.memory.codec import KeyDtype, encode
from pema_ray.memory.plan import ShardPlan, common_prompt_prefix, plan_batches
from pema_ray.memory.shards import MemoryRows
from pema_ray.tasks import EncodedPair


class Extractor(Protocol):
    """The part of a `ContextSource` that a build needs."""

    def extract(self, batch: ExtractBatch) -> torch.Tensor: ...


def rows_of_batch(source: Extractor, batch: Sequence[EncodedPair], eos: int, key_dtype: KeyDtype) -> MemoryRows:
    """All rows of the examples, example after example."""
    request = ExtractBatch(
        token_ids=[example.prompt + example.target for example in batch],
        first=[len(example.prompt) - 1 for example in batch],
    )
    keys = encode(source.extract(request).float().numpy(), key_dtype)
    targets = [np.array([*example.target, eos], np.int32) for example in batch]
    return MemoryRows(
        key=keys,
        target=np.concatenate(targets),
        example_id=np.concatenate(
            [np.full(len(t), e.example_id, np.int64) for e, t in zip(batch, targets, strict=True)]
        ),
        position=np.concatenate([np.arange(len(t), dtype=np.int32) for t in targets]),
    )


def rows_of_shard(
    source: Extractor, shard: ShardPlan, eos: int, key_dtype: KeyDtype, max_batch_tokens: int
) -> tuple[MemoryRows, int, int]:
    """A shard's rows in the order of its examples, with the token positions computed, bare and padded."""
    shared = common_prompt_prefix(shard.examples)
    parts, tokens, padded = [], 0, 0
    for batch in plan_batches(shard.examples, max_batch_tokens, shared):
        parts.append(rows_of_batch(source, batch, eos, key_dtype))
        lengths = [len(e.prompt) + len(e.target) - shared for e in batch]
        tokens += sum(lengths)
        padded += max(lengths) * len(lengths)
    rows = MemoryRows.concatenate(parts)
    rank = {example.example_id: place for place, example in enumerate(shard.examples)}
    order = np.argsort([rank[example] for example in rows.example_id.tolist()], kind="stable")
    return rows.take(order), tokens, padded
