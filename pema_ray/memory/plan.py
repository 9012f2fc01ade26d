"""One shard as a unit of work: its examples, which of them the PLM accepts, and which share a forward pass.

All of it depends on the shard's examples and two settings alone, never on the number of actors or of requests in
flight, so that every build gives the same bytes. A shard's examples are consecutive; its batches are bucketed by
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
    """One unit of work: a file name, its examples, and the context of their representations."""

    name: str
    examples: tuple[EncodedPair, ...]
    context: Context = "teacher_forced"
    weights: Weights | None = None
    """How often each row of an example occurs, if not once; None: the shard's rows have no weights."""
    prompt_from: int | None = None
    """First token of prompts that has a row; None: only targets have rows."""
    eos_row: bool = True
    """The last row of an example predicts EOS; off if it is a piece of a longer text."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all prompts begin with, up to the first position that has a row."""
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
    """`(accepted examples, rejected ones)`, each in order."""
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
    """The first token of an example that has a row: its prompt's last, or an earlier one if prompts have rows."""
    last = len(example.prompt) - 1
    return last if prompt_from is None else min(prompt_from, last)


def count_duplicates(examples: Sequence[EncodedPair], eos: int, context: Context) -> Weights:
    """Find equal rows: the first gets their number as its weight, the others 0.

    Two rows are equal if their targets and all tokens before them are: prompt and gold prefix, or, in the generated
    context, prompt and position (the PLM continues equal prompts equally).

    Returns:
        A weight for each row of the examples that share a prompt with another; every other row occurs once.
    """
    by_prompt: dict[tuple[int, ...], list[EncodedPair]] = {}
    for example in examples:
        by_prompt.setdefault(tuple(example.prompt), []).append(example)
    weights: dict[int, list[int]] = {}
    for group in (group for group in by_prompt.values() if len(group) > 1):
        first: dict[tuple[int, int], tuple[int, int]] = {}  # (prefix, target) → (example, position) of the first row
        nodes: dict[tuple[int, int], int] = {}  # a tree of gold prefixes: (prefix, token) → longer prefix
        for example in group:
            own_weights = weights[example.example_id] = [1] * (len(example.target) + 1)
            prefix = 0
            for position, token in enumerate([*example.target, eos]):
                owner, row = first.setdefault((prefix, token), (example.example_id, position))
                if owner != example.example_id:
                    weights[owner][row] += 1
                    own_weights[position] = 0
                prefix = position + 1 if context == "generated" else nodes.setdefault((prefix, token), len(nodes) + 1)
    return {example_id: tuple(counts) for example_id, counts in weights.items()}


def plan_batches(examples: Sequence[EncodedPair], max_tokens: int, shared: int = 0) -> Iterator[list[EncodedPair]]:
    """Batches of examples of similar length, shortest first, each within `max_tokens` padded positions.

    Args:
        shared: leading tokens that all examples share; they are computed once and do not count.
    """
    ordered = sorted(examples, key=lambda e: (len(e.prompt) + len(e.target), e.example_id))
    batch: list[EncodedPair] = []
    for example in ordered:
        longest = len(example.prompt) + len(example.target) - shared  # ordered: this one is the longest
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
