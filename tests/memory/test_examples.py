"""Prepared pairs are read by ranges, worded as the run words them, and named by their content alone."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle
from pema_ray.memory.build import run_build
from pema_ray.memory.examples import ListedExamples, PreparedPairs, Wording, content_digest, read_pairs
from pema_ray.tasks import EncodedPair, Pair, Prompter, Task
from pema_ray.tasks.shots import SimilarShots
from tests.memory import kit

TASK = Task(name="t", template="Modern English. Old: {source}\nModern:", chat_system="Be modern.")
PAIRS = [Pair(i * 7 % 23, f"And he said unto them number {i} ä", f"He said {i} ß to them") for i in range(23)]


def write(path: Path, pairs: list[Pair], row_group: int = 8) -> Path:
    pq.write_table(pa.Table.from_pylist([asdict(pair) for pair in pairs]), path, row_group_size=row_group)
    return path


@pytest.fixture(scope="module")
def bundle(tiny_source, tmp_path_factory) -> Path:
    return tiny_source("llama").lm_head().save(tmp_path_factory.mktemp("bundle") / "lm_head")


@given(row_group=st.integers(1, 30), start=st.integers(0, 25), size=st.integers(0, 25))
def test_a_range_is_read_whatever_the_row_groups(tmp_path_factory, row_group: int, start: int, size: int):
    path = write(tmp_path_factory.mktemp("pairs") / "train.parquet", PAIRS, row_group)
    assert list(read_pairs(path, start, start + size)) == PAIRS[start : start + size]
    assert list(read_pairs(path)) == PAIRS


def test_only_the_row_groups_of_a_range_are_read(tmp_path: Path, monkeypatch):
    path, read = write(tmp_path / "train.parquet", PAIRS), []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, n: read.append(n) or original(self, n))
    assert len(list(read_pairs(path, 9, 17))) == 8
    assert read == [1, 2]


def test_a_digest_names_the_pairs_and_nothing_else(tmp_path: Path):
    digest = content_digest(write(tmp_path / "a.parquet", PAIRS))
    assert content_digest(write(tmp_path / "b.parquet", PAIRS, 5)) == digest
    shifted = Pair(PAIRS[0].example_id, PAIRS[0].source + PAIRS[0].target[:1], PAIRS[0].target[1:])
    joined = [Pair(0, "ab", "c"), Pair(1, "d", "e")], [Pair(0, "a", "c"), Pair(1, "bd", "e")]
    variants = [PAIRS[::-1], PAIRS[:-1], [shifted, *PAIRS[1:]], [replace(PAIRS[0], example_id=99), *PAIRS[1:]], *joined]
    digests = {content_digest(write(tmp_path / f"{n}.parquet", pairs)) for n, pairs in enumerate(variants)}
    assert len(digests | {digest}) == len(variants) + 1


def test_pairs_are_worded_as_a_prompter_words_them_also_after_they_travelled(bundle: Path, tmp_path: Path):
    tokenizer = LMHeadBundle.load(bundle).tokenizer()
    path = write(tmp_path / "train.parquet", PAIRS)
    for wording, prompter in (
        (Wording(bundle, TASK), Prompter(tokenizer, TASK)),
        (Wording(bundle, TASK, chat=True), Prompter(tokenizer, TASK, chat=True)),
        (Wording(bundle, TASK, shown=tuple(PAIRS[:2])), Prompter(tokenizer, TASK, PAIRS[:2])),
        (Wording(bundle, TASK, similar=path, shots=2), Prompter(tokenizer, TASK, SimilarShots(PAIRS, 2))),
    ):
        pairs = pickle.loads(pickle.dumps(PreparedPairs(path, wording)))
        assert len(pairs) == 23 and pairs.digest == PreparedPairs(path, wording).digest
        assert pairs.read(3, 10) == [prompter.encode_pair(pair) for pair in PAIRS[3:10]]


def test_every_choice_of_words_is_another_wording(bundle: Path, tmp_path: Path):
    path, reversed_path = write(tmp_path / "a.parquet", PAIRS), write(tmp_path / "b.parquet", PAIRS[::-1])
    plain, chat = Wording(bundle, TASK), Wording(bundle, TASK, chat=True)
    system = TASK.model_copy(update={"chat_system": "Be old."})
    wordings = [
        plain,
        chat,
        replace(plain, task=TASK.model_copy(update={"template": "{source}"})),
        replace(chat, task=system),
        replace(plain, shown=tuple(PAIRS[:1])),
        replace(plain, shown=tuple(PAIRS[:2])),
        replace(plain, similar=path, shots=2),
        replace(plain, similar=path, shots=3),
        replace(plain, similar=reversed_path, shots=2),
    ]
    assert len({wording.digest for wording in wordings}) == len(wordings)
    assert replace(plain, task=system).digest == plain.digest  # the system prompt is for chats alone


def test_another_tokenizer_makes_other_examples_of_the_same_words(bundle: Path, tmp_path: Path, monkeypatch):
    path = write(tmp_path / "train.parquet", PAIRS)
    before = PreparedPairs(path, Wording(bundle, TASK)).digest
    encode = Prompter.encode_pair

    def seam_moved(self, pair: Pair) -> EncodedPair:
        example = encode(self, pair)
        return EncodedPair(example.example_id, example.prompt[:-1], example.prompt[-1:] + example.target)

    monkeypatch.setattr(Prompter, "encode_pair", seam_moved)
    assert PreparedPairs(path, Wording(bundle, TASK)).digest != before


def test_listed_examples_differ_by_any_token_and_by_their_order():
    listed = [EncodedPair(1, [5, 6], [7]), EncodedPair(2, [5], [6, 7])]
    variants = [
        listed[::-1],
        listed[:1],
        [EncodedPair(1, [5], [6, 7]), listed[1]],
        [EncodedPair(3, [5, 6], [7]), listed[1]],
    ]
    assert len({ListedExamples(one).digest for one in (listed, *variants)}) == 5
    assert ListedExamples(tuple(listed)).digest == ListedExamples(listed).digest


@pytest.mark.parametrize("content", [None, b"no Parquet"])
def test_a_split_that_is_missing_or_broken_is_named(bundle: Path, tmp_path: Path, content: bytes | None):
    path = tmp_path / "train.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"train.parquet: (no such prepared split|not a readable Parquet).*pema-ray prepare"
    ):
        len(PreparedPairs(path, Wording(bundle, TASK)))


@pytest.mark.cluster
def test_tasks_tokenise_what_one_process_would(ray_cluster, bundle: Path, tmp_path: Path, monkeypatch):
    pairs = PreparedPairs(write(tmp_path / "train.parquet", PAIRS), Wording(bundle, TASK))
    local, remote = (replace(kit.build(tmp_path / name), examples=pairs) for name in ("local", "remote"))
    assert pairs.at_hand
    kit.in_this_process(local)
    run_build(local, kit.fake_plm())
    monkeypatch.setattr("pema_ray.memory.examples._FEW", 0)
    assert not pairs.at_hand
    run_build(remote, kit.fake_plm())
    assert kit.contents(local.folder) == kit.contents(remote.folder)
