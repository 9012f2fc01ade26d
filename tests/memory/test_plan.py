"""A plan gives every example one place, keeps its budget, and depends on nothing but examples and settings."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pema_ray.memory.plan import ShardPlan, common_prompt_prefix, count_duplicates, plan_batches
from pema_ray.tasks import EncodedPair

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=30)


@st.composite
def some_examples(draw) -> list[EncodedPair]:
    texts = draw(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=20))
    return [EncodedPair(number, prompt, target) for number, (prompt, target) in enumerate(texts)]


def size(example: EncodedPair) -> int:
    return len(example.prompt) + len(example.target)


@given(examples=some_examples(), budget=st.integers(1, 200))
def test_every_example_is_in_one_batch_and_batches_keep_the_budget(examples: list[EncodedPair], budget: int):
    shared = common_prompt_prefix(examples)
    batches = list(plan_batches(examples, budget, shared))
    assert sorted(e.example_id for batch in batches for e in batch) == [e.example_id for e in examples]
    for batch in batches:
        padded = len(batch) * (max(map(size, batch)) - shared)
        assert padded <= budget or len(batch) == 1
    lengths = [size(e) for batch in batches for e in batch]
    assert lengths == sorted(lengths)


@given(examples=some_examples(), budget=st.integers(1, 200), order=st.randoms(use_true_random=False))
def test_batches_do_not_depend_on_the_order_given(examples: list[EncodedPair], budget: int, order):
    shuffled = list(examples)
    order.shuffle(shuffled)
    assert list(plan_batches(shuffled, budget)) == list(plan_batches(examples, budget))


@given(examples=some_examples())
def test_the_common_prefix_is_common_and_no_longer_one_is(examples: list[EncodedPair]):
    shared = common_prompt_prefix(examples)
    prompts = [e.prompt for e in examples]
    assert len({tuple(p[:shared]) for p in prompts}) == 1
    assert any(len(p) == shared for p in prompts) or len({p[shared] for p in prompts}) > 1


@given(examples=some_examples(), prompt_from=st.none() | st.integers(0, 5))
def test_a_shards_prefix_is_common_and_leaves_every_position_that_has_a_row(examples, prompt_from: int | None):
    prefix = ShardPlan("s", tuple(examples), prompt_from=prompt_from).prefix
    assert all(tuple(e.prompt[: len(prefix)]) == prefix for e in examples)
    firsts = [len(e.prompt) - 1 if prompt_from is None else min(prompt_from, len(e.prompt) - 1) for e in examples]
    assert len(prefix) == min(*firsts, common_prompt_prefix(examples))


# ── equal rows ──────────────────────────────────────────────────────────────

FEW = st.lists(st.integers(0, 1), min_size=1, max_size=4)


@given(
    texts=st.lists(st.tuples(FEW, FEW), min_size=1, max_size=25),
    context=st.sampled_from(["teacher_forced", "generated"]),
)
def test_equal_rows_are_counted_once_with_their_number(texts, context: str):
    eos = 1
    examples = [EncodedPair(number * 3, prompt, target) for number, (prompt, target) in enumerate(texts)]

    def row(example: EncodedPair, position: int) -> tuple:
        gold = [*example.target, eos]
        before = tuple(gold[:position]) if context == "teacher_forced" else position
        return tuple(example.prompt), before, gold[position]

    expected = Counter(row(e, at) for e in examples for at in range(len(e.target) + 1))
    weights = count_duplicates(examples, eos, context)
    actual: Counter = Counter()
    for example in examples:
        counts = weights.get(example.example_id, (1,) * (len(example.target) + 1))
        assert len(counts) == len(example.target) + 1
        for at, count in enumerate(counts):
            if count:
                assert row(example, at) not in actual
                actual[row(example, at)] = count
    assert actual == expected


def test_rows_of_equal_examples_are_counted_at_the_first():
    twice = [EncodedPair(0, [5], [6, 7]), EncodedPair(1, [5], [6, 7]), EncodedPair(2, [5], [6, 8])]
    assert count_duplicates(twice, 1, "teacher_forced") == {0: (3, 2, 2), 1: (0, 0, 0), 2: (0, 1, 1)}
    assert count_duplicates(twice, 1, "generated") == {0: (3, 2, 3), 1: (0, 0, 0), 2: (0, 1, 0)}
