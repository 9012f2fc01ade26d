"""The specification of one memory: its examples, the settings that decide its bytes, and its shards.

Shard i holds the examples i·n up to (i+1)·n, so that names and ranges follow from the number of examples alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pema_ray.line import ModelCard
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import Examples
from pema_ray.memory.plan import Context, Rejected, ShardPlan, Weights, count_duplicates, sort_out
from pema_ray.runtime.placement import ANYWHERE, PlacementConfig
from pema_ray.tasks import EncodedPair

_SCHEME = 2  # version of dividing examples into shards; part of the plan hash


@dataclass(frozen=True)
class MemoryBuild:
    """One memory to be built: its folder, its examples (bad ones too), and the contents of its manifest."""

    folder: Path
    examples: Examples
    card: ModelCard
    task: str
    split: str
    config: BuildMemoryConfig
    shared_tokens: int = 0
    """Number of tokens that all prompts of the task begin with."""
    eos_row: bool = True
    """Each example ends with a row of EOS; off if examples are pieces of one text."""
    end_token: int | None = None
    """Target of that row; by default the PLM's first EOS."""
    placement: PlacementConfig = ANYWHERE
    """Nodes of actors and tasks."""

    @property
    def context(self) -> Context:
        """The configured context, but teacher-forced for `test`: its likelihoods are of the gold prefix."""
        return "teacher_forced" if self.split == "test" else self.config.context

    @property
    def shards(self) -> int:
        """Number of shards, including empty ones."""
        return -(-len(self.examples) // self.config.examples_per_shard)

    @property
    def prompt_from(self) -> int | None:
        """The first token of prompts that has a row; None if prompts have no rows."""
        return self.shared_tokens if self.config.prompts else None

    @cached_property
    def weights(self) -> Weights | None:
        """How often the rows of examples with equal prompts occur; None without `build_memory.deduplicate`.

        Comparing needs all examples in this process, some KB each.
        """
        if not (self.config.deduplicate and self.split == "train"):
            return None
        good, _ = sort_out(self.examples.read(0, len(self.examples)), self._longest)
        return count_duplicates(good, self.eos_token_ids[0], self.context)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an example, `end_token` first."""
        ids = self.card.eos_token_ids
        return ids if self.end_token is None else tuple(dict.fromkeys((self.end_token, *ids)))

    @property
    def _longest(self) -> int:
        return self.card.max_positions + (not self.eos_row)  # without a row of EOS the last token is no input

    @cached_property
    def plan_hash(self) -> str:
        """16 hex digits, equal for two builds exactly if they write the same shards."""
        settings: dict[str, object] = {
            "scheme": _SCHEME,
            "examples": self.examples.digest,
            "fingerprint": self.card.fingerprint,
            "longest": self._longest,
            "key_dtype": self.config.key_dtype,
            "examples_per_shard": self.config.examples_per_shard,
            "max_batch_tokens": self.config.max_batch_tokens,
            "context": self.context,
        }
        if self.context == "generated":
            settings["sequences"] = self.config.sequences
        if self.config.deduplicate and self.split == "train":
            settings["deduplicate"] = True
        if self.config.prompts:
            settings["prompt_from"] = self.shared_tokens
        if not self.eos_row:
            settings["eos_row"] = False
        if self.eos_token_ids != self.card.eos_token_ids:
            settings["end_token"] = self.end_token
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, number: int) -> list[EncodedPair]:
        """All examples of a shard, tokenised."""
        n = self.config.examples_per_shard
        return self.examples.read(number * n, min((number + 1) * n, len(self.examples)))

    def shard(self, number: int, examples: Sequence[EncodedPair]) -> tuple[ShardPlan, list[Rejected]]:
        """A shard as a unit of work, from all of its examples, and the rejected ones."""
        good, bad = sort_out(examples, self._longest)
        weights = None
        if self.weights is not None:
            good = [e for e in good if any(self.weights.get(e.example_id, (1,)))]
            weights = {e.example_id: self.weights[e.example_id] for e in good if e.example_id in self.weights}
        plan = ShardPlan(shard_name(number), tuple(good), self.context, weights, self.prompt_from, self.eos_row)
        return plan, bad


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"
