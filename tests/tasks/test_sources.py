"""Pairs are read from a file unchanged, and every error names file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.runtime.files import sha256_of
from pema_ray.tasks import Pair, Task, load_pairs
from pema_ray.tasks.sources import _draw, name_of_example, read_file
from pema_ray.tasks.task import Columns

COLUMNS = Columns(source="en", target="du")
TASK = Task(name="t", template="{source}", columns=COLUMNS)
ROWS = [{"en": "Good day", "du": "Guten Tag"}, {"en": 'große, "Zahl"', "du": "two words"}, {"en": "x", "du": "y"}]
TEXTS = [(row["en"], row["du"]) for row in ROWS]


def texts(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in pairs]


def write(folder: Path, content: str | bytes, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_file(path, COLUMNS))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_json_lines_are_read_with_bom_blank_lines_and_more_columns(tmp_path: Path):
    content = "\ufeff" + jsonl([ROWS[0] | {"id": 7}]) + "\n  \n" + jsonl(ROWS[1:]).rstrip("\n")
    assert texts(read_file(write(tmp_path, content), COLUMNS)) == TEXTS


def test_pairs_of_all_files_are_numbered_apart_and_those_of_a_copy_alike(tmp_path: Path):
    by_file: dict[str, list[Pair]] = {}
    for number, kind in enumerate(("one", "two")):
        (tmp_path / kind).mkdir()
        rows = [{"en": f"{kind} {i}", "du": "x"} for i in range(40)]
        by_file[f"{kind}.jsonl"] = list(read_file(write(tmp_path, jsonl(rows), f"{kind}.jsonl"), COLUMNS))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / kind / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows[: number + 1]), tmp_path / kind / "b.parquet")
        (tmp_path / kind).rename(tmp_path / f"{kind}.parquet")
        by_file[kind] = list(read_file(tmp_path / f"{kind}.parquet", COLUMNS))
    ids = [pair.example_id for pairs in by_file.values() for pair in pairs]
    assert len(ids) == len(set(ids)) and min(ids) >= 0 and max(ids) < 2**63
    for pairs in by_file.values():
        assert [pair.example_id for pair in pairs] == sorted(pair.example_id for pair in pairs)
    copy = write(tmp_path, (tmp_path / "one.jsonl").read_bytes(), "copy.jsonl")
    assert list(read_file(copy, COLUMNS)) == by_file["one.jsonl"]
    checksum = sha256_of(copy)[:8]
    assert name_of_example(by_file["one.jsonl"][6].example_id) == f"the example of line 7 of the file {checksum}…"


def test_text_is_trimmed_at_its_ends(tmp_path: Path):
    path = write(tmp_path, jsonl([{"en": " a b ", "du": "\tc\n"}]))
    assert texts(read_file(path, COLUMNS)) == [("a b", "c")]


def test_csv_tsv_and_parquet_hold_the_same_pairs(tmp_path: Path):
    import csv

    for name, delimiter in (("p.csv", ","), ("p.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["en", "du"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        assert texts(read_file(tmp_path / name, COLUMNS)) == TEXTS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert texts(read_file(tmp_path / "p.parquet", COLUMNS)) == TEXTS


def test_missing_and_empty_files_and_unknown_suffixes_are_named(tmp_path: Path):
    assert complaint(tmp_path / "gone.jsonl") == "no such file."
    assert complaint(write(tmp_path, "")) == "the file is empty."
    assert complaint(write(tmp_path, "\n\n")) == "the file holds no pairs."
    assert complaint(write(tmp_path, "en,du\n", "p.csv")) == "the file holds no pairs."
    assert complaint(write(tmp_path, "x", "p.txt")).startswith("unknown kind of file; use .jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert complaint(tmp_path / "folder.jsonl") == "is a folder, expected a file."


def test_a_wrong_column_names_line_columns_and_the_nearest(tmp_path: Path):
    message = complaint(write(tmp_path, jsonl([ROWS[0], {"en": "a", "dus": "b"}])))
    assert message == "line 2: no column 'du' (the task's target); found 'en', 'dus'. Did you mean 'dus'?"
    assert complaint(write(tmp_path, "{}\n")).startswith("line 1: no column 'en' (the task's source); found none.")
    pq.write_table(pa.table({"english": ["a"], "du": ["b"]}), tmp_path / "p.parquet")
    assert complaint(tmp_path / "p.parquet").startswith("line 1: no column 'en'")


def test_a_broken_json_line_is_named_by_its_number(tmp_path: Path):
    assert complaint(write(tmp_path, jsonl(ROWS[:1]) + '\n{"en": "a", \n')).startswith("line 3: broken JSON:")
    assert complaint(write(tmp_path, '["a", "b"]\n')) == "line 1: expected a JSON object, found a list."
    assert complaint(write(tmp_path, '{"en": 5, "du": "b"}\n')) == "line 1: column 'en' holds a int, expected text."
    assert complaint(write(tmp_path, '{"en": null, "du": "b"}\n')).startswith("line 1: column 'en' holds a NoneType")
    assert "line 1: column 'du' holds a lone surrogate" in complaint(write(tmp_path, '{"en": "a", "du": "\\ud83d!"}'))


def test_invalid_utf8_is_named_by_its_line_and_byte(tmp_path: Path):
    content = jsonl(ROWS[:1]).encode() + b'{"en": "\xff", "du": "b"}\n'
    assert complaint(write(tmp_path, content)) == "line 2: not valid UTF-8 (byte 8 of the line)."
    assert complaint(write(tmp_path, b"en,du\na,\xe9\n", "p.csv")).startswith("line 2: not valid UTF-8")


def test_parquet_text_that_is_no_utf8_and_json_without_bottom_are_refused(tmp_path: Path):
    raw = pa.table({"en": _not_utf8(), "du": ["b"]})
    pq.write_table(raw, tmp_path / "p.parquet")
    assert complaint(tmp_path / "p.parquet").startswith("not valid UTF-8 in a text column")
    deep = write(tmp_path, '{"en": ' + "[" * 100_000 + "\n")
    assert complaint(deep) == "line 1: JSON that is nested too deeply."


def _not_utf8() -> pa.Array:
    """A string column whose bytes are not UTF-8: pyarrow does not check."""
    offsets, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    return pa.StringArray.from_buffers(1, offsets, data)


def test_an_empty_text_is_named_by_role_and_line(tmp_path: Path):
    message = "line 2: the target (column 'du') is empty."
    assert complaint(write(tmp_path, jsonl([ROWS[0], {"en": "a", "du": "  "}]))) == message
    assert complaint(write(tmp_path, "en,du\n,b\n", "p.csv")) == "line 2: the source (column 'en') is empty."


def test_broken_csv_and_parquet_are_named(tmp_path: Path):
    assert complaint(write(tmp_path, "en,du\na,b,c\n", "p.csv")) == "line 2: more fields than the header names."
    assert complaint(write(tmp_path, "en,du\na\n", "p.csv")).startswith("line 2: no column 'du'")
    assert complaint(write(tmp_path, b"PAR1 this is none", "p.parquet")).startswith("not a readable Parquet file")
    valid = tmp_path / "valid.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), valid)
    assert complaint(write(tmp_path, valid.read_bytes()[:-9], "cut.parquet")).startswith("not a readable Parquet file")


def test_splits_come_from_the_task_and_the_users_files_win(tmp_path: Path):
    files = {s: str(write(tmp_path, jsonl(ROWS[:n]), f"{s}.jsonl")) for n, s in enumerate(("train", "dev", "test"), 1)}
    task = TASK.model_copy(update={"source": TASK.source.model_copy(update={"files": {"train": "gone.jsonl"}})})
    assert {split: len(pairs) for split, pairs in load_pairs(task, files).items()} == {"train": 1, "dev": 2, "test": 3}
    with pytest.raises(UserError, match="needs a file for split 'test': set task.files.test=<path>"):
        load_pairs(TASK, {"train": files["train"], "dev": files["dev"]})
    with pytest.raises(UserError, match="unknown split 'tset'. Did you mean 'test'"):
        load_pairs(TASK, files | {"tset": "x"})


@settings(max_examples=30)
@given(total=st.integers(0, 60), small=st.integers(1, 60), surplus=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_smaller_limit_is_a_prefix_of_a_larger_one(total: int, small: int, surplus: int, seed: int):
    pairs = [Pair(i, "s", "t") for i in range(total)]
    shuffled = _draw(pairs, None, seed)
    assert sorted(pair.example_id for pair in shuffled) == list(range(total))
    few, many = _draw(pairs, small, seed), _draw(pairs, small + surplus, seed)
    assert many[: len(few)] == few == shuffled[:small]


def test_limits_are_drawn_with_the_seed_and_checked(tmp_path: Path):
    rows = [{"en": f"a{i}", "du": f"b{i}"} for i in range(50)]
    path = str(write(tmp_path, jsonl(rows)))
    files = dict.fromkeys(("train", "dev", "test"), path)
    first = load_pairs(TASK, files, {"train": 5})
    assert (len(first["train"]), len(first["dev"])) == (5, 50)
    assert first == load_pairs(TASK, files, {"train": 5})
    assert first["train"] != load_pairs(TASK, files, {"train": 5}, seed=1)["train"]
    with pytest.raises(UserError, match="unknown split 'trian'. Did you mean 'train'"):
        load_pairs(TASK, files, {"trian": 5})
    with pytest.raises(UserError, match="'dev' must keep at least one pair, got 0"):
        load_pairs(TASK, files, {"dev": 0})
