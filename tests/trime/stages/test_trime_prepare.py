"""From text to token ids: documents, vocabularies, what is refused. The stage itself runs on a local Ray."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.trime.config import PrepareConfig, Split, TrimeConfig
from pema_ray.trime.stages import prepare
from pema_ray.trime.stages.prepare import cut_into_shards
from pema_ray.trime.text.corpus import Span, deal_out, find_documents, scan
from pema_ray.trime.text.segments import TokenStream
from pema_ray.trime.text.vocabulary import EOS, UNKNOWN, Vocabulary, from_counts, from_tokenizer, split_text, train_bpe

WIKI = """ 
 = The House = 
 
 The house is old . 
 = = Garden = = 
 It has a garden . 
 
 = Ö = 
 
 A letter , the house of sounds . 
"""


def vocabulary_of(text: str, **settings) -> Vocabulary:
    config = PrepareConfig(**settings)
    return from_counts(config, Counter(split_text(text, config)))


# ── documents ───────────────────────────────────────────────────────────────


def test_wikitext_is_cut_into_its_articles_and_nothing_is_lost(tmp_path: Path):
    path = tmp_path / "wiki.txt"
    path.write_text(WIKI, encoding="utf-8")
    spans = scan(path, PrepareConfig())
    assert [span.title for span in spans] == ["The House", "Ö"]
    assert "".join(span.text() for span in spans) == WIKI
    assert spans[1].text().startswith(" = Ö = \n")


def test_without_a_pattern_a_file_is_one_document(tmp_path: Path):
    (tmp_path / "book.txt").write_text("one\ntwo")
    (span,) = scan(tmp_path / "book.txt", PrepareConfig(document_start=None))
    assert (span.title, span.text()) == ("book", "one\ntwo")


def test_json_lines_are_documents_with_titles(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a b", "title": "T"}\n\n{"text": "ç\\nd"}\n', encoding="utf-8")
    assert [(span.title, span.text()) for span in scan(path, PrepareConfig())] == [("T", "a b"), ("d 3", "ç\nd")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.txt", None, r"none.txt: no such file"),
        ("empty.txt", b"\n \n", r"empty.txt: holds no text"),
        ("latin.txt", b"caf\xe9\n", r"latin.txt: not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r"bad.jsonl: line 2: broken JSON"),
        ("bare.jsonl", b'{"words": "a"}\n', r"bare.jsonl: line 1: has no 'text'"),
    ],
)
def test_a_file_that_is_no_corpus_is_named(name: str, content: bytes | None, complaint: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        scan(tmp_path / name, PrepareConfig())


def test_a_split_without_documents_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UserError, match="split 'dev' has no document"):
        find_documents(PrepareConfig(files={"train": (str(tmp_path / "a.txt"),)}), 0, tmp_path)
    with pytest.raises(UserError, match="'trian' is no split. Did you mean 'train'?"):
        read_config(TrimeConfig, None, ["prepare.files={trian: [x]}"])
    with pytest.raises(UserError, match="the split 'all' and shares go together"):
        read_config(TrimeConfig, None, ["prepare.files={all: [x]}"])


@given(st.lists(st.integers(1, 50), min_size=10, max_size=60), st.integers(0, 99))
def test_documents_are_dealt_out_whole_once_and_by_length(lengths: list[int], seed: int):
    spans = [Span("f", n, n + length, str(n)) for n, length in enumerate(lengths)]
    parts = deal_out(spans, {"dev": 0.2, "test": 0.1}, seed)
    assert sorted(span.start for part in parts.values() for span in part) == list(range(len(lengths)))
    shares: tuple[tuple[Split, float], ...] = (("dev", 0.2), ("test", 0.1))
    for split, share in shares:
        starts = [span.start for span in parts[split]]
        assert starts == sorted(starts)
        assert share * sum(lengths) <= sum(lengths[n] for n in starts) <= share * sum(lengths) + 50


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 60))
def test_shards_hold_every_document_in_order(lengths: list[int], tokens: int):
    spans = [Span("f", 0, length, str(n)) for n, length in enumerate(lengths)]
    shards = list(cut_into_shards("train", spans, PrepareConfig(tokens_per_shard=tokens)))
    assert [span for shard in shards for span in shard.spans] == spans
    assert [shard.first for shard in shards] == [sum(len(s.spans) for s in shards[:n]) for n in range(len(shards))]
    assert len({shard.name for shard in shards}) == len(shards)


# ── vocabularies ────────────────────────────────────────────────────────────


def test_words_are_numbered_from_the_most_frequent_on_and_lines_end():
    vocabulary = vocabulary_of("b a b\n\nb c\n")
    assert vocabulary.tokens == ["<eos>", "b", "a", "c", "<unk>"]
    ids = vocabulary.encode("b zebra\n\nc")
    assert [vocabulary.tokens[i] for i in ids] == ["b", UNKNOWN, EOS, EOS, "c", EOS]
    assert vocabulary.decode(ids) == "b <unk>\n\n c\n"


def test_rare_words_are_unknown_and_a_vocabulary_has_its_most():
    assert vocabulary_of("a a b\n", min_count=2).tokens == ["a", "<eos>", "<unk>"]
    limited = vocabulary_of("a a a b b c\n", max_words=4)
    assert limited.tokens == ["a", "b", "<eos>", "<unk>"]


def test_punctuation_is_cut_from_words():
    config = PrepareConfig(words="punctuation", line_ends=False)
    expected = ["Don't", "go", ",", UNKNOWN, "!", "(", "3", ":", "16", ")"]
    assert list(split_text("Don't go, <unk>! (3:16)", config)) == expected


@pytest.mark.parametrize("kind", ["byte", "character"])
@given(text=st.text(min_size=1, max_size=40))
def test_bytes_and_characters_come_back_as_they_were(kind: str, text: str):
    vocabulary = vocabulary_of(text, vocabulary=kind)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    if kind == "byte":
        assert len(vocabulary.encode(text)) == len(text.encode())


def test_byte_level_bpe_says_any_text():
    vocabulary = train_bpe(PrepareConfig(vocabulary="bpe", max_words=300), ["the house of the garden\n"] * 9)
    text = "the garden\nÖ 漢\n"
    ids = vocabulary.encode(text)
    assert len(vocabulary) <= 300 and (ids == vocabulary.eos_id).sum() == 2
    assert vocabulary.decode(ids) == text
    assert vocabulary.unknown_id is None
    assert len(vocabulary.encode("the")) == 1 + 1


def test_the_tokenizer_of_a_model_may_be_the_vocabulary(tiny_plm_folder, tokenizer):
    name = tiny_plm_folder("llama")
    vocabulary = from_tokenizer(PrepareConfig(vocabulary="tokenizer", tokenizer=name))
    assert len(vocabulary) == len(tokenizer)
    expected = tokenizer("The house.\nOld", add_special_tokens=False).input_ids
    assert vocabulary.encode("The house.\nOld").tolist() == [*expected, tokenizer.eos_token_id]
    with pytest.raises(UserError, match=r"prepare.tokenizer=/nowhere: cannot be loaded"):
        from_tokenizer(PrepareConfig(vocabulary="tokenizer", tokenizer="/nowhere"))


def test_a_vocabulary_is_kept_and_read(tmp_path: Path):
    vocabulary = vocabulary_of("a b\n")
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path).tokens == vocabulary.tokens
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable vocabulary"):
        Vocabulary.load(tmp_path)


# ── the stage ───────────────────────────────────────────────────────────────


def configured(tmp_path: Path, **settings) -> TrimeConfig:
    tmp_path.mkdir(exist_ok=True)
    for split, text in {"train": WIKI * 5, "dev": WIKI, "test": WIKI.replace("garden", "yard")}.items():
        if not (tmp_path / f"{split}.txt").exists():
            (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    files = {split: (str(tmp_path / f"{split}.txt"),) for split in ("train", "dev", "test")}
    return TrimeConfig.model_validate(
        {"run_dir": str(tmp_path / "run"), "prepare": {"files": files, "tokens_per_shard": 20, **settings}}
    )


@pytest.mark.cluster
def test_prepare_leaves_shards_that_plain_pyarrow_reads_and_makes_only_what_is_missing(ray_cluster, tmp_path: Path):
    config = configured(tmp_path)
    metrics = prepare.run(config)
    folder = tmp_path / "run/prepare"
    assert metrics["splits"]["train"]["documents"] == 10 and metrics["splits"]["test"]["unknown"] == 1
    shards = sorted((folder / "train").glob("*.parquet"))
    assert len(shards) > 1
    table = pq.read_table(shards)
    assert table.column("document").to_pylist() == list(range(10))
    stream, vocabulary = TokenStream.open(folder, "train"), Vocabulary.load(folder)
    assert stream.token_T.tolist() == vocabulary.encode(WIKI * 5).tolist()
    assert stream.start_D.tolist() == np.cumsum([0, *map(len, table.column("token").to_pylist())])[:-1].tolist()
    assert stream.titles[:2] == ("The House", "Ö")

    assert prepare.run(config) == {**metrics}  # reused
    times = {path: path.stat().st_mtime_ns for path in shards[1:]}
    content = shards[0].read_bytes()
    shards[0].unlink()
    (folder / "metrics.json").unlink()
    prepare.run(config)
    assert shards[0].read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.cluster
def test_too_many_unknown_tokens_are_refused_with_examples(ray_cluster, tmp_path: Path):
    config = configured(tmp_path, max_unknown=0.01)
    with pytest.raises(UserError, match=r"of the test split's \d+ tokens are not in the training vocabulary .*'yard'"):
        prepare.run(config)


@pytest.mark.cluster
def test_held_out_books_of_the_last_translation_are_dev_and_test_and_the_others_stay(ray_cluster, tmp_path: Path):
    books = ["Mark", "Luke", "Jude"]
    settings = {"corpus": "bible", "translations": ["kjv", "web"], "books": books, "words": "punctuation"}
    config = TrimeConfig.model_validate({"run_dir": str(tmp_path), "prepare": settings})
    prepare.run(config)
    titles = {split: TokenStream.open(tmp_path / "prepare", split).titles for split in ("train", "dev", "test")}
    assert titles == {
        "train": ("Mark (kjv)", "Luke (kjv)", "Jude (kjv)", "Jude (web)"),
        "dev": ("Mark (web)",),
        "test": ("Luke (web)",),
    }
    stamp = json.loads((tmp_path / "prepare/metrics.json").read_text())["stamp"]
    assert stamp != prepare.TrimeRun(config.model_copy(update={"seed": 1})).stamp("prepare")
    settings["translations"] = ["xyz"]
    missing = TrimeConfig.model_validate({"run_dir": str(tmp_path / "x"), "prepare": settings})
    with pytest.raises(UserError, match="'xyz' is not installed: pip install pythonbible-xyz"):
        prepare.run(missing)
