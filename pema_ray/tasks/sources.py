"""Reads pairs from JSON Lines, Parquet, CSV or a packaged corpus. Every error names file and line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError, nearest
from pema_ray.runtime.files import sha256_of
from pema_ray.tasks import bible, docstrings
from pema_ray.tasks.task import BookSplit, Columns, PackageSplit, Task

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """A source text and its target, with an id for all later stages.

    Attributes:
        example_id: of a file's pair, the first bits of the file's checksum and the line: unique over all files and
            splits. `name_of_example` reads it.
    """

    example_id: int
    source: str
    target: str


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line without a valid pair, and the reason."""

    split: str
    file: str
    line: int
    reason: str


def load_pairs(
    task: Task,
    files: Mapping[str, str] | None = None,
    limits: Mapping[str, int] | None = None,
    seed: int = 0,
    rejected: list[RejectedLine] | None = None,
) -> dict[str, list[Pair]]:
    """All splits of a task.

    Args:
        files: split -> path; overrides the task's own.
        limits: split -> number of pairs to keep, drawn at random with `seed`.
        rejected: collects the lines with an empty text; without it, they raise an error.

    Raises:
        UserError: a file, line, column or pair that cannot be used, by name and number.
    """
    limits = limits or {}
    for split, limit in limits.items():
        if split not in SPLITS:
            raise UserError(f"task.limits: unknown split '{split}'.{nearest(split, list(SPLITS))}")
        if limit < 1:
            raise UserError(f"task.limits: '{split}' must keep at least one pair, got {limit}.")
    pairs = _packaged_pairs(task) or _file_pairs(task, files or {}, rejected)
    return {split: _draw(split_pairs, limits.get(split), seed) for split, split_pairs in pairs.items()}


def _draw(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    # Shuffled once, so that a smaller limit is a prefix of a larger one: 20,000 pairs contain the 1,500.
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    return pairs[:limit]


def _packaged_pairs(task: Task) -> dict[str, list[Pair]] | None:
    if task.source.bible:
        return _bible_pairs(task.source.bible)
    return _docstring_pairs(task.source.docstrings) if task.source.docstrings else None


def _docstring_pairs(source: PackageSplit) -> dict[str, list[Pair]]:
    """One pair for each distinct code: packages repeat functions, which must not be in two splits."""
    pairs: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    split_of_code: dict[str, str] = {}
    for package in source.packages:
        for function in docstrings.functions(package, source.max_characters):
            if function.code not in split_of_code:
                split = docstrings.split_of(function.module, source.dev, source.test)
                split_of_code[function.code] = split
                pairs[split].append(
                    Pair((function.checksum << _LINE_BITS) + function.line, function.code, function.summary)
                )
    for split, split_pairs in pairs.items():
        if not split_pairs:
            raise UserError(f"source.docstrings: no function of {', '.join(source.packages)} is left for '{split}'.")
    return pairs


def _bible_pairs(books: BookSplit) -> dict[str, list[Pair]]:
    bible.check_books((*books.dev, *books.test))
    pairs: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for number, book, source, target in bible.verses(books.source, books.target):
        pairs[bible.split_of(book, books.dev, books.test)].append(Pair(number, source, target))
    return pairs


def _file_pairs(task: Task, files: Mapping[str, str], rejected: list[RejectedLine] | None) -> dict[str, list[Pair]]:
    paths = {**task.source.files, **files}
    for split in SPLITS:
        if split not in paths:
            raise UserError(f"Task '{task.name}' needs a file for split '{split}': set task.files.{split}=<path>.")
    for split in paths:
        if split not in SPLITS:
            raise UserError(f"task.files: unknown split '{split}'.{nearest(split, list(SPLITS))}")
    return {split: list(read_file(Path(paths[split]), task.columns, split, rejected)) for split in SPLITS}


_LINE_BITS = 31  # of an example id; 32 more hold the file's checksum


def name_of_example(example_id: int) -> str:
    """An example's name in messages."""
    line = example_id & (2**_LINE_BITS - 1)
    checksum = example_id >> _LINE_BITS
    return f"example {example_id}" if checksum <= 0 else f"the example of line {line} of the file {checksum:08x}…"


def _first_example_id(path: Path) -> int:
    """The file's part of its example ids. It depends on the contents alone, so that a copy has the same ids."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = [sha256_of(file) for file in files]
    digest = digests[0] if path.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()
    return int(digest[:8], 16) << _LINE_BITS


class EmptyText(UserError):
    """A line's source or target is empty."""


def read_file(
    path: Path, columns: Columns, split: str = "", rejected: list[RejectedLine] | None = None
) -> Iterator[Pair]:
    """Pairs of one file, in the order of their lines and example ids.

    Args:
        rejected: collects the lines with an empty text; without it, they raise an error.

    Raises:
        UserError: missing or empty file, invalid UTF-8, broken JSON, missing column, empty text, unknown suffix.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; use {', '.join(readers)}.")
    if path.is_dir() and reader is not _parquet:
        raise UserError(f"{path}: is a folder, expected a file.")
    first, line = _first_example_id(path), 0
    for line, row in reader(path):
        try:
            source = _text(path, line, row, columns.source, "source")
            target = _text(path, line, row, columns.target, "target")
        except EmptyText as empty:
            if rejected is None:
                raise
            rejected.append(RejectedLine(split, str(path), line, str(empty).removeprefix(f"{path}: line {line}: ")))
            continue
        yield Pair(first + line, source, target)
    if line == 0:
        raise UserError(f"{path}: the file holds no pairs.")


def _text(path: Path, line: int, row: Mapping[str, Any], column: str, role: str) -> str:
    if column not in row:
        raise UserError(
            f"{path}: line {line}: no column '{column}' (the task's {role}); "
            f"found {', '.join(map(repr, row)) or 'none'}.{nearest(column, list(row))}"
        )
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{path}: line {line}: column '{column}' holds a {type(value).__name__}, expected text.")
    if not value.strip():
        raise EmptyText(f"{path}: line {line}: the {role} (column '{column}') is empty.")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can spell half a character
        raise UserError(f"{path}: line {line}: column '{column}' holds a lone surrogate, which no tokenizer takes.")
    return value.strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number}: not valid UTF-8 (byte {error.start} of the line).") from None


def _json_lines(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number}: broken JSON: {error.msg} (column {error.colno}).") from None
        except RecursionError:
            raise UserError(f"{path}: line {number}: JSON that is nested too deeply.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: expected a JSON object, found a {type(row).__name__}.")
        yield number, row


def _csv(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    import csv

    text = (line for _, line in _lines(path))
    reader = csv.DictReader(text, delimiter="\t" if path.suffix == ".tsv" else ",", restval=None)
    try:
        for row in reader:
            if None in row:
                raise UserError(f"{path}: line {reader.line_num}: more fields than the header names.")
            yield reader.line_num, {key: value for key, value in row.items() if value is not None}
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: broken CSV: {error}.") from None


def _parquet(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 in a text column ({error.reason}).") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from enumerate(rows, start=1)
