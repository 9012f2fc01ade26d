"""Rows are the representations before each target token and before EOS, in the order of the examples."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, PLMClient, Step
from pema_ray.line.retry import PatientPLM
from pema_ray.memory.plan import ShardPlan
from pema_ray.memory.rows import BlockingExtractor, generated_rows_of_shard, rows_of_shard
from pema_ray.memory.shards import MemoryRows
from pema_ray.tasks import EncodedPair, Pair, Prompter, Task
from tests.memory.kit import fake_plm, next_token

EOS = 1


EXAMPLES = (
    EncodedPair(70, [10, 20, 30], [4, 5]),
    EncodedPair(8, [10, 20], [6]),
    EncodedPair(9, [10, 20, 7, 8], [1, 2, 3]),
)


def teacher_forced(plm, shard: ShardPlan, key_dtype="float32", budget: int = 1000) -> tuple[MemoryRows, int, int]:
    return asyncio.run(rows_of_shard(plm, shard, EOS, key_dtype, budget))


@pytest.mark.parametrize("budget", [1, 8, 1000])
def test_rows_lie_at_positions_p_minus_1_to_p_plus_t_minus_1_with_eos_last(budget: int):
    rows, tokens, padded = teacher_forced(fake_plm()(), ShardPlan("s", EXAMPLES), "float32", budget)
    assert rows.target.tolist() == [4, 5, EOS, 6, EOS, 1, 2, 3, EOS]
    assert rows.example_id.tolist() == [70, 70, 70, 8, 8, 9, 9, 9, 9]
    assert rows.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    expected = [[60, 2], [64, 3], [69, 4], [30, 1], [36, 2], [45, 3], [46, 4], [48, 5], [51, 6]]
    assert rows.key[:].tolist() == expected
    assert (rows.key.dtype, rows.target.dtype, rows.position.dtype) == ("float32", np.int32, np.int32)
    assert rows.example_id.dtype == np.int64
    assert tokens == 4 + 2 + 6  # without the prefix [10]: a row of example 8 stands at the shared 20 too
    assert padded == {1: 2 + 4 + 6, 8: 2 * 4 + 6, 1000: 3 * 6}[budget]


def test_targets_are_seen_by_the_plm_but_eos_is_not_and_the_shared_prefix_is_sent_once():
    plm = fake_plm()()
    teacher_forced(plm, ShardPlan("s", EXAMPLES))
    (batch,) = plm.messages
    assert batch == ExtractBatch([[20, 6], [20, 30, 4, 5], [20, 7, 8, 1, 2, 3]], [0, 1, 2], prefix=(10,))


def test_an_extractor_without_prefixes_gets_whole_sequences():
    requests = []

    def function(batch: ExtractBatch) -> torch.Tensor:
        requests.append(batch)
        return torch.zeros(batch.rows, 2)

    teacher_forced(BlockingExtractor(function), ShardPlan("s", EXAMPLES))
    assert requests == [ExtractBatch([[10, 20, 6], [10, 20, 30, 4, 5], [10, 20, 7, 8, 1, 2, 3]], [1, 2, 3])]


def test_requests_are_under_way_together_within_the_window_and_change_nothing():
    class Counted:
        """Waits until nothing else moves, so that requests pile up as far as they may."""

        def __init__(self):
            self.plm, self.current, self.peak = fake_plm()(), 0, 0

        async def extract(self, batch):
            self.current += 1
            self.peak = max(self.peak, self.current)
            for _ in range(20):
                await asyncio.sleep(0)
            self.current -= 1
            return await self.plm.extract(batch)

    async def rows(plm, window: int) -> MemoryRows:
        shard = ShardPlan("s", tuple(EncodedPair(i, [5, i], [6] * (1 + i % 3)) for i in range(12)))
        return (await rows_of_shard(plm, shard, EOS, "float32", 4, asyncio.Semaphore(window)))[0]

    one, three = Counted(), Counted()
    alone, together = asyncio.run(rows(one, 1)), asyncio.run(rows(three, 3))
    assert (one.peak, three.peak) == (1, 3)
    assert np.array_equal(alone.key[:], together.key[:]) and np.array_equal(alone.target, together.target)


def test_float16_keys_are_rounded_and_an_overflow_is_refused():
    rows, _, _ = teacher_forced(fake_plm()(), ShardPlan("s", EXAMPLES), "float16", 1000)
    assert rows.key.dtype == "float16"
    huge = (EncodedPair(1, [70_000], [5]),)
    with pytest.raises(
        UserError, match="reaches 7e\\+04, float16 ends at 65504. Set build_memory.key_dtype to bfloat16"
    ):
        teacher_forced(fake_plm()(), ShardPlan("s", huge), "float16", 1000)


async def test_rows_of_a_real_model_do_not_depend_on_the_batches(tiny_client, tokenizer):
    plm = tiny_client("llama")
    prompter = Prompter(tokenizer, Task(name="t", template="Modern English. Old: {source}\nModern:"))
    texts = ["ye", "And he said unto them", "Go ye and tell", "what ye have seen and heard", "I am"]
    shard = ShardPlan("s", tuple(prompter.encode_pair(Pair(i, t, t.replace("ye", "you"))) for i, t in enumerate(texts)))
    one, tokens, padded = await rows_of_shard(plm, shard, EOS, "float32", 10_000)
    many, _, bare = await rows_of_shard(plm, shard, EOS, "float32", 1)
    np.testing.assert_allclose(one.key[:], many.key[:], atol=1e-4, rtol=1e-4)
    for field in ("target", "example_id", "position"):
        assert np.array_equal(getattr(one, field), getattr(many, field))
    assert padded > tokens == bare
    for example in shard.examples:
        alone = await plm.extract(ExtractBatch([example.prompt + example.target], [len(example.prompt) - 1]))
        is_example = one.example_id == example.example_id
        np.testing.assert_allclose(one.key[is_example], alone.numpy(), atol=1e-4, rtol=1e-4)
        assert one.target[is_example].tolist() == [*example.target, EOS]


# ── the generated context ───────────────────────────────────────────────────


async def greedy_alone(plm: PLMClient, example: EncodedPair, eos: tuple[int, ...]) -> list[torch.Tensor]:
    """States along the PLM's own continuation of one prompt, recomputed from the start for every token."""
    head, ids, states = (await plm.lm_head()).head, list(example.prompt), []
    while len(states) <= len(example.target):
        (state,) = await plm.extract(ExtractBatch([ids], [len(ids) - 1]))
        states.append(state)
        token = int(head.logits(head.norm(state)).argmax())
        if token in eos:
            break
        ids.append(token)
    return states


def generated_examples(seed: int = 0, count: int = 11) -> tuple[EncodedPair, ...]:
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(3, 300, draw.integers(1, 20)).tolist() for _ in range(count)]
    return tuple(
        EncodedPair(i * 2, p, draw.integers(3, 300, draw.integers(1, 9)).tolist()) for i, p in enumerate(prompts)
    )


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2"])  # gemma2's windows take no newcomers
@pytest.mark.parametrize("sequences", [1, 4, 100])
async def test_generated_rows_follow_the_plms_own_continuation(tiny_client, model: str, sequences: int):
    plm, shard = tiny_client(model, slots=sequences), ShardPlan("s", generated_examples(), "generated")
    common = await greedy_alone(plm, shard.examples[0], ())  # some token that the PLM does say ends a continuation
    head = (await plm.lm_head()).head
    eos = (7, int(head.logits(head.norm(common[min(1, len(common) - 1)])).argmax()))
    rows, tokens = await generated_rows_of_shard(plm, shard, eos, "float32", sequences)
    assert_rows(rows, tokens, [(e, await greedy_alone(plm, e, eos)) for e in shard.examples], eos)
    assert not (await plm.engine()).batcher.live_sessions


async def test_builds_that_ask_for_all_slots_do_not_block_each_other(tiny_client):
    plm = tiny_client("llama", slots=4, idle_seconds=3600, timeout_seconds=3600)
    shards = [ShardPlan("s", generated_examples(seed), "generated") for seed in range(3)]
    patient = PatientPLM(plm, 3600.0)
    async with asyncio.timeout(120):
        builds = [generated_rows_of_shard(patient, shard, (EOS,), "float32", 4) for shard in shards]
        together = await asyncio.gather(*builds)
    for shard, (rows, tokens) in zip(shards, together, strict=True):
        alone, expected = await generated_rows_of_shard(plm, shard, (EOS,), "float32", 1)
        np.testing.assert_allclose(rows.key[:], alone.key[:], atol=1e-4, rtol=1e-4)
        assert rows.target.tolist() == alone.target.tolist() and tokens == expected
    await plm.step([Step("after all closings", 0, [5])])
    assert (await plm.engine()).batcher.live_sessions == 1


def assert_rows(rows: MemoryRows, tokens: int, expected: list, eos: Sequence[int]) -> None:
    """The rows are the states along each example's continuation, beside its gold tokens."""
    np.testing.assert_allclose(rows.key[:], torch.stack([s for _, states in expected for s in states]), atol=1e-3)
    gold = [t for e, states in expected for t in [*e.target, eos[0]][: len(states)]]
    assert rows.target.tolist() == gold
    assert rows.example_id.tolist() == [e.example_id for e, states in expected for _ in states]
    assert rows.position.tolist() == [i for _, states in expected for i in range(len(states))]
    assert any(len(states) <= len(e.target) for e, states in expected)  # a continuation did end early,
    assert any(len(states) == len(e.target) + 1 for e, states in expected)  # and one reached the EOS row
    assert tokens == sum(len(e.prompt) - 1 + len(states) for e, states in expected)


def fake_states(example: EncodedPair) -> list[torch.Tensor]:
    """States along the fake PLM's continuation, one token after the other."""
    ids, states = list(example.prompt), []
    while len(states) <= len(example.target):
        states.append(torch.tensor([float(sum(ids)), float(len(ids) - 1)]))
        if (token := next_token(ids)) == EOS:
            break
        ids.append(token)
    return states


def long_examples(count: int = 20) -> tuple[EncodedPair, ...]:
    """With targets of several chunks, and prompts without a common prefix."""
    draw = np.random.default_rng(3)
    return tuple(
        EncodedPair(i, [i + 3, *draw.integers(3, 90, 4).tolist()], draw.integers(3, 90, draw.integers(1, 30)).tolist())
        for i in range(count)
    )


def run_generated(plm, examples: tuple[EncodedPair, ...], sequences: int = 6) -> tuple[MemoryRows, int]:
    patient = PatientPLM(plm, 5.0)
    return asyncio.run(
        generated_rows_of_shard(patient, ShardPlan("s", examples, "generated"), (EOS,), "float32", sequences)
    )


@pytest.mark.parametrize("sequences", [1, 6, 100])
def test_sessions_go_on_in_chunks_many_to_a_message_and_are_closed(sequences: int):
    plm, examples = fake_plm()(), long_examples()
    rows, tokens = run_generated(plm, examples, sequences)
    assert_rows(rows, tokens, [(e, fake_states(e)) for e in examples], (EOS,))
    limits = asyncio.run(plm.describe()).limits
    assert max(map(len, plm.messages)) == min(sequences, limits.max_steps)
    assert max(step.draft for message in plm.messages for step in message) == limits.max_draft
    assert not plm.sessions and len(set(plm.closed)) == len(examples)


@given(lost=st.sets(st.integers(0, 60), max_size=6), busy=st.sets(st.integers(0, 60), max_size=3))
def test_lost_sessions_are_opened_again_and_busy_steps_repeated_and_no_row_changes(lost: set[int], busy: set[int]):
    plm, examples = fake_plm()(), long_examples()
    answer, numbers = plm.answer, iter(range(10_000))

    def faulty(step):
        number = next(numbers)
        if number in lost:
            plm.sessions.clear()
        return Busy("no free slot", 0.0) if number in busy else answer(step)

    plm.answer = faulty
    rows, _ = run_generated(plm, examples)
    undisturbed, _ = run_generated(fake_plm()(), examples)
    assert np.array_equal(rows.key[:], undisturbed.key[:]) and np.array_equal(rows.target, undisturbed.target)


def test_a_refused_session_ends_the_build_and_closes_the_others(tmp_path: Path):
    plm = fake_plm(tmp_path)()
    (tmp_path / "revoked").touch()
    with pytest.raises(UserError, match="the key was revoked"):
        run_generated(plm, long_examples(3))
    assert len(plm.closed) == 3


def test_the_plm_owner_sees_no_gold_token():
    """Gold tokens are numbers that the PLM does not say and no prompt holds."""
    examples = tuple(EncodedPair(i, [3 + i, 40, 41], [200 + i, 250, 260]) for i in range(6))
    plm = fake_plm()()
    rows, _ = run_generated(plm, examples, 2)
    received = {token for message in plm.messages for step in message for token in step.tokens}
    gold = {token for e in examples for token in e.target}
    assert set(rows.target.tolist()) & gold and not received & gold
