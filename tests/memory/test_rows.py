"""Rows are the representations before each target token and before EOS, in the order of the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch
from pema_ray.memory.plan import ShardPlan
from pema_ray.memory.rows import generated_rows_of_shard, rows_of_shard
from pema_ray.tasks import EncodedPair, Pair, Prompter, Task

EOS = 1


class Counting:
    """An extractor whose representation at a position is (sum of the ids so far, position)."""

    def __init__(self) -> None:
        self.batches: list[ExtractBatch] = []

    def extract(self, batch: ExtractBatch) -> torch.Tensor:
        self.batches.append(batch)
        rows = [
            [float(sum(ids[: at + 1])), float(at)]
            for ids, first in zip(batch.token_ids, batch.first, strict=True)
            for at in range(first, len(ids))
        ]
        return torch.tensor(rows)


EXAMPLES = (
    EncodedPair(70, [10, 20, 30], [4, 5]),
    EncodedPair(8, [10, 20], [6]),
    EncodedPair(9, [10, 20, 7, 8], [1, 2, 3]),
)


@pytest.mark.parametrize("budget", [1, 8, 1000])
def test_rows_lie_at_positions_p_minus_1_to_p_plus_t_minus_1_with_eos_last(budget: int):
    rows, tokens, padded = rows_of_shard(Counting(), ShardPlan("s", EXAMPLES), EOS, "float32", budget)
    assert rows.target.tolist() == [4, 5, EOS, 6, EOS, 1, 2, 3, EOS]
    assert rows.example_id.tolist() == [70, 70, 70, 8, 8, 9, 9, 9, 9]
    assert rows.position.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    expected = [[60, 2], [64, 3], [69, 4], [30, 1], [36, 2], [45, 3], [46, 4], [48, 5], [51, 6]]
    assert rows.key[:].tolist() == expected
    assert (rows.key.dtype, rows.target.dtype, rows.position.dtype) == ("float32", np.int32, np.int32)
    assert rows.example_id.dtype == np.int64
    assert tokens == 3 + 1 + 5  # the shared prefix [10, 20] apart
    assert padded == {1: 1 + 3 + 5, 8: 2 * 3 + 5, 1000: 3 * 5}[budget]


def test_targets_are_seen_by_the_plm_but_eos_is_not():
    source = Counting()
    rows_of_shard(source, ShardPlan("s", EXAMPLES), EOS, "float32", 1000)
    (batch,) = source.batches
    assert batch.token_ids == [[10, 20, 6], [10, 20, 30, 4, 5], [10, 20, 7, 8, 1, 2, 3]]
    assert batch.first == [1, 2, 3]


def test_float16_keys_are_rounded_and_an_overflow_is_refused():
    rows, _, _ = rows_of_shard(Counting(), ShardPlan("s", EXAMPLES), EOS, "float16", 1000)
    assert rows.key.dtype == "float16"
    huge = (EncodedPair(1, [70_000], [5]),)
    with pytest.raises(
        UserError, match="reaches 7e\\+04, float16 ends at 65504. Set build_memory.key_dtype to bfloat16"
    ):
        rows_of_shard(Counting(), ShardPlan("s", huge), EOS, "float16", 1000)


def test_rows_of_a_real_model_do_not_depend_on_the_batches(tiny_source, tokenizer):
    source = tiny_source("llama")
    prompter = Prompter(tokenizer, Task(name="t", template="Modern English. Old: {source}\nModern:"))
    texts = ["ye", "And he said unto them", "Go ye and tell", "what ye have seen and heard", "I am"]
    shard = ShardPlan("s", tuple(prompter.encode_pair(Pair(i, t, t.replace("ye", "you"))) for i, t in enumerate(texts)))
    one, tokens, padded = rows_of_shard(source, shard, EOS, "float32", 10_000)
    many, _, bare = rows_of_shard(source, shard, EOS, "float32", 1)
    np.testing.assert_allclose(one.key[:], many.key[:], atol=1e-4, rtol=1e-4)
    for field in ("target", "example_id", "position"):
        assert np.array_equal(getattr(one, field), getattr(many, field))
    assert padded > tokens == bare
    for example in shard.examples:
        alone = source.extract(ExtractBatch([example.prompt + example.target], [len(example.prompt) - 1]))
        mine = one.example_id == example.example_id
        np.testing.assert_allclose(one.key[mine], alone.numpy(), atol=1e-4, rtol=1e-4)
        assert one.target[mine].tolist() == [*example.target, EOS]


# ── the generated context ───────────────────────────────────────────────────


def greedy_alone(source, example: EncodedPair, eos: tuple[int, ...]) -> list[torch.Tensor]:
    """States along the PLM's own continuation of one prompt, recomputed from the start for every token."""
    head, ids, states = source.lm_head().head, list(example.prompt), []
    while len(states) <= len(example.target):
        (state,) = source.extract(ExtractBatch([ids], [len(ids) - 1]))
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
def test_generated_rows_follow_the_plms_own_continuation(tiny_source, model: str, sequences: int):
    source, shard = tiny_source(model), ShardPlan("s", generated_examples(), "generated")
    before = set(source._sessions)
    common = greedy_alone(source, shard.examples[0], ())  # some token that the PLM does say ends a continuation
    head = source.lm_head().head
    eos = (7, int(head.logits(head.norm(common[min(1, len(common) - 1)])).argmax()))
    rows, tokens = generated_rows_of_shard(source, shard, eos, "float32", sequences)
    expected = [(e, greedy_alone(source, e, eos)) for e in shard.examples]
    np.testing.assert_allclose(rows.key[:], torch.stack([s for _, states in expected for s in states]), atol=1e-3)
    gold = [t for e, states in expected for t in [*e.target, eos[0]][: len(states)]]
    assert rows.target.tolist() == gold
    assert rows.example_id.tolist() == [e.example_id for e, states in expected for _ in states]
    assert rows.position.tolist() == [i for _, states in expected for i in range(len(states))]
    assert any(len(states) <= len(e.target) for e, states in expected)  # a continuation did end early,
    assert any(len(states) == len(e.target) + 1 for e, states in expected)  # and one reached the EOS row
    assert tokens == sum(len(e.prompt) - 1 + len(states) for e, states in expected)
    assert set(source._sessions) == before


def test_the_plm_owner_sees_no_gold_token(tiny_source):
    source = tiny_source("llama")

    class Listening:
        def __init__(self):
            self.heard: list[int] = []

        def __getattr__(self, name):
            return getattr(source, name)

        def open(self, prompts):
            self.heard += [token for prompt in prompts for token in prompt]
            return source.open(prompts)

        def admit(self, session, position, prompts):
            self.heard += [token for prompt in prompts for token in prompt]
            return source.admit(session, position, prompts)

        def extend(self, session, position, rows, tokens):
            said.update(tokens)
            return source.extend(session, position, rows, tokens)

        def extract(self, batch):
            raise AssertionError("a gold prefix would cross the line")

    said: set[int] = set()
    examples = tuple(EncodedPair(i, [3 + i, 40, 41], [200 + i, 250, 260]) for i in range(6))
    listening = Listening()
    rows, _ = generated_rows_of_shard(listening, ShardPlan("s", examples, "generated"), (1,), "float32", 2)
    assert sorted(listening.heard) == sorted(token for e in examples for token in e.prompt)
    gold = {token for e in examples for token in e.target}
    assert set(rows.target.tolist()) & gold and not (said & gold - said_by_plm(source, examples))


def said_by_plm(source, examples) -> set[int]:
    """Tokens of the PLM's own continuations, which may be gold ones by chance."""
    head = source.lm_head().head
    states = [s for e in examples for s in greedy_alone(source, e, (1,))]
    return {int(head.logits(head.norm(s)).argmax()) for s in states}
