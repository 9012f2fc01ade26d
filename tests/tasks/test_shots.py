"""Examples in prompts: the same for every source, or the most similar pairs, and never the source itself."""

from __future__ import annotations

import json

import pytest

from pema_ray.errors import UserError
from pema_ray.tasks import Pair, Prompter, Task, load_pairs
from pema_ray.tasks.shots import SimilarShots, first_shots

PAIRS = [
    Pair(3, "the lord said unto moses", "the lord said to moses"),
    Pair(1, "verily verily I say unto thee", "most certainly I tell you"),
    Pair(2, "a time to weep and a time to laugh", "there is a time for tears"),
    Pair(7, "verily I say unto you all", "most certainly I tell you all"),
]
TASK = Task(name="t", template="Old: {source}\nNew: ")


def test_shots_are_the_first_pairs_worth_showing_whatever_the_order():
    pairs = [Pair(9, "x" * 80, "y"), Pair(1, "short", "y"), Pair(4, "z" * 80, "z" * 80), Pair(2, "w" * 80, "y")]
    assert [pair.example_id for pair in first_shots(pairs, 2)] == [2, 9]
    assert [pair.example_id for pair in first_shots(pairs, 3)] == [1, 2, 9]  # rather short than telling nothing
    with pytest.raises(UserError, match="task.shots=5, but there are only 4"):
        first_shots(pairs, 5)


def test_pairs_of_any_length_can_be_shown_the_most_moderate_ones_first():
    pairs = [Pair(number, "w" * length, "y") for number, length in enumerate((5, 20, 4000, 130))]
    assert [pair.example_id for pair in first_shots(pairs, 2)] == [1, 3]
    assert len(first_shots(pairs, 4)) == 4


def test_the_likest_pair_stands_last():
    shots = SimilarShots(PAIRS, 2)
    assert [pair.example_id for pair in shots.like("verily he that shall say unto you all")] == [1, 7]
    assert shots.like("a time to laugh")[-1].example_id == 2


def test_a_pair_is_never_shown_to_itself():
    shots = SimilarShots(PAIRS, 2)
    for pair in PAIRS:
        assert pair in shots.like(pair.source)
        examples = shots.like(pair.source, pair.example_id)
        assert len(examples) == 2
        assert pair not in examples


def test_the_training_pair_that_is_exactly_like_a_test_pair_is_shown(tmp_path):
    """Both are the first of their files, which are numbered apart."""
    row = {"source": "a time to laugh", "target": "a time to be glad"}
    others = [{"source": f"number {word}", "target": word} for word in ("one", "two", "three")]
    for split, rows in (("train", [row, *others]), ("dev", others), ("test", [row])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(twin) + "\n" for twin in rows))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")}
    splits = load_pairs(Task(name="t", template="{source}"), files)
    (query,) = splits["test"]
    assert SimilarShots(splits["train"], 2).like(query.source, query.example_id)[-1].target == "a time to be glad"


def test_a_source_like_nothing_is_shown_examples_all_the_same():
    assert len(SimilarShots(PAIRS, 3).like("xyzzy")) == 3
    assert len(SimilarShots(PAIRS, 3).like("")) == 3


def test_the_order_of_the_pairs_does_not_matter():
    assert SimilarShots(PAIRS, 2).like("say unto") == SimilarShots(PAIRS[::-1], 2).like("say unto")


def test_more_pairs_than_shots_are_needed():
    with pytest.raises(UserError, match="task.shots=4 with task.show=similar needs more than 4"):
        SimilarShots(PAIRS, 4)


def test_prompts_show_them_and_all_begin_alike_only_until_the_first(plm_tokenizer):
    prompter = Prompter(plm_tokenizer, TASK, SimilarShots(PAIRS, 1))
    assert prompter.text("a time to cast away") == (
        "Old: a time to weep and a time to laugh\nNew: there is a time for tears\n\nOld: a time to cast away\nNew: "
    )
    encoded = prompter.encode_pair(PAIRS[1])
    text = plm_tokenizer.decode(encoded.prompt)
    assert "verily I say unto you all" in text
    prompts = [prompter.encode_prompt(pair.source, pair.example_id) for pair in PAIRS]
    shared = prompter.shared_tokens
    assert 0 < shared < min(map(len, prompts))
    assert all(prompt[:shared] == prompts[0][:shared] for prompt in prompts)
