"""One shard as a unit of work: its examples, which of them the PLM can take, and which share a forward pass.

All of it depends on the shard's examples and two settings alone, never on the number of actors or of requests under
way, so that any build of it gives the same bytes. A shard's examples are consecutive; its batches are bucketed by
length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pema_ray.tasks import EncodedPair

Context = Literal["teacher_forced", "generated"]
Weights = Mapping[int, tuple[int, ...]]  # example_id → a number for each of its rows


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One unit of work: a file name, the examples that go into it, and where their representations come from."""

    name: str
    examples: tuple[EncodedPair, ...]
    context: Context = "teacher_forced"
    weights: Weights | None = None
    """How often each row of an example occurs, where that is not once; None: the shard's rows carry no weights."""
    prompt_from: int | None = None
    """Rows of prompts are kept too, from this token of theirs on; None: of targets only."""
    eos_row: bool = True
    """The last row of an example pairs all of it with EOS; off where it is a piece of a longer text."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all prompts begin with, short of every position that has a row."""
        first = min(first_position(example, self.prompt_from) for example in self.examples)
        return tuple(self.examples[0].prompt[: min(first, common_prompt_prefix(self.examples))])


@dataclass(frozen=True, slots=True)
class Rejected:
    """An example that cannot become rows, and why."""

    example_id: int
    reason: str
    prompt_tokens: int
    target_tokens: int


def sort_out(examples: Sequence[EncodedPair], max_positions: int) -> tuple[list[EncodedPair], list[Rejected]]:
    """`(examples the PLM can take, the others)`, each in their order."""
    good: list[EncodedPair] = []
    bad: list[Rejected] = []
    for example in examples:
        prompt, target = len(example.prompt), len(example.target)
        if not target:
            bad.append(Rejected(example.example_id, "the target is empty", prompt, target))
        elif prompt + target > max_positions:
            reason = f"prompt and target have {prompt + target} tokens, the PLM allows {max_positions}"
            bad.append(Rejected(example.example_id, reason, prompt, target))
        else:
            good.append(example)
    return good, bad


def first_position(example: EncodedPair, prompt_from: int | None) -> int:
    """The first token of an example that has a row: its prompt's last, or an earlier one where prompts have rows."""
    last = len(example.prompt) - 1
    return last if prompt_from is None else min(prompt_from, last)


def count_duplicates(examples: Sequence[EncodedPair], eos: int, context: Context) -> Weights:
    """Find equal rows: the first of them gets their number as its weight, the others 0.

    Two rows are equal when their target is, and all the tokens before it: prompt and gold prefix, or, in the
    generated context, the prompt and the position (what the PLM says after equal prompts is equal).

    Returns:
        A weight for each row of the examples that share a prompt with another; every other row occurs once.
    """
    alike: dict[tuple[int, ...], list[EncodedPair]] = {}
    for example in examples:
        alike.setdefault(tuple(example.prompt), []).append(example)
    weights: dict[int, list[int]] = {}
    for group in (group for group in alike.values() if len(group) > 1):
        first: dict[tuple[int, int], tuple[int, int]] = {}  # (what came before, target) → where it was seen first
        nodes: dict[tuple[int, int], int] = {}  # a tree of gold prefixes: (prefix, token) → longer prefix
        for example in group:
            mine = weights[example.example_id] = [1] * (len(example.target) + 1)
            before = 0
            for position, token in enumerate([*example.target, eos]):
                owner, where = first.setdefault((before, token), (example.example_id, position))
                if owner != example.example_id:
                    weights[owner][where] += 1
                    mine[position] = 0
                before = position + 1 if context == "generated" else nodes.setdefault((before, token), len(nodes) + 1)
    return {example_id: tuple(counts) for example_id, counts in weights.items()}


def plan_batches(examples: Sequence[EncodedPair], max_tokens: int, shared: int = 0) -> Iterator[list[EncodedPair]]:
    """Batches of examples of similar length, shortest first, each within `max_tokens` padded positions.

    Args:
        shared: leading tokens that all examples share; they are computed once and take no room.
    """
    ordered = sorted(examples, key=lambda e: (len(e.prompt) + len(e.target), e.example_id))
    batch: list[EncodedPair] = []
    for example in ordered:
        longest = len(example.prompt) + len(example.target) - shared  # ordered: the newcomer is the longest
        if batch and longest * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def common_prompt_prefix(examples: Sequence[EncodedPair]) -> int:
    """How many tokens all prompts begin with."""
    lowest, highest = min(e.prompt for e in examples), max(e.prompt for e in examples)
    limit = min(len(lowest), len(highest))
    return next((i for i in range(limit) if lowest[i] != highest[i]), limit)
