"""Where documents begin and end in text files, JSON Lines and packaged Bible translations. Knows no vocabulary.

Files are scanned once and named by byte ranges, so that any process can read its own documents.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import PrepareConfig, Split

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Span:
    """A document: bytes `start` to `end` of a file."""

    file: str
    start: int
    end: int
    title: str

    def text(self) -> str:
        with open(self.file, "rb") as file:
            file.seek(self.start)
            raw = file.read(self.end - self.start).decode("utf-8")
        return json.loads(raw)["text"] if self.file.endswith(".jsonl") else raw


def find_documents(config: PrepareConfig, seed: int, folder: Path) -> dict[Split, list[Span]]:
    """The documents of every split.

    Args:
        folder: where the packaged corpus is written out as JSON Lines.

    Raises:
        UserError: a file is missing, empty or not text; a split has no document.
    """
    files = bible_files(config, folder) if config.corpus == "bible" else config.files
    documents = {split: [span for name in names for span in scan(Path(name), config)] for split, names in files.items()}
    if "all" in documents:
        for split, spans in deal_out(documents.pop("all"), config.shares, seed).items():
            documents[split] = documents.get(split, []) + spans
    for split in SPLITS:
        if not documents.get(split):
            raise UserError(
                f"prepare.files: the split '{split}' has no document. Name its files, or use all and shares."
            )
    return {split: documents[split] for split in SPLITS}


def scan(path: Path, config: PrepareConfig) -> list[Span]:
    """The documents of one file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file (prepare.files).")
    try:
        spans = _scan_jsonl(path) if path.suffix == ".jsonl" else _scan_text(path, config.document_start)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (near byte {error.start} of a line).") from None
    if not spans:
        raise UserError(f"{path}: holds no text.")
    return spans


def _scan_text(path: Path, document_start: str | None) -> list[Span]:
    try:
        begins = re.compile(document_start) if document_start else None
    except re.error as error:
        raise UserError(f"prepare.document_start: no regular expression: {error}") from None
    spans: list[Span] = []
    start, title, text_seen, position = 0, path.stem, False, 0
    with path.open("rb") as file:
        for raw in file:
            line = raw.decode("utf-8").rstrip("\n")
            if begins and begins.search(line):
                if text_seen:
                    spans.append(Span(str(path.absolute()), start, position, title))
                    start = position
                title, text_seen = line.strip(" ="), True  # empty lines before the first title belong to it
            elif line.strip():
                text_seen = True
            position += len(raw)
    if text_seen:
        spans.append(Span(str(path.absolute()), start, position, title))
    return spans


def _scan_jsonl(path: Path) -> list[Span]:
    spans: list[Span] = []
    position = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    row = json.loads(raw)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number}: broken JSON: {error.msg}.") from None
                if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
                    raise UserError(f"{path}: line {number}: has no 'text'.")
                title = str(row.get("title", f"{path.stem} {number}"))
                spans.append(Span(str(path.absolute()), position, position + len(raw), title))
            position += len(raw)
    return spans


def deal_out(spans: list[Span], shares: dict[Any, float], seed: int) -> dict[Split, list[Span]]:
    """Whole documents to dev and test until each has its share of the bytes, the rest to train; order is kept."""
    order = list(range(len(spans)))
    random.Random(seed).shuffle(order)
    total = sum(span.end - span.start for span in spans)
    split_of: dict[int, Split] = {}
    for split in ("dev", "test"):
        size = 0
        while order and size < shares.get(split, 0) * total:
            number = order.pop()
            split_of[number] = split
            size += spans[number].end - spans[number].start
    return {split: [span for i, span in enumerate(spans) if split_of.get(i, "train") == split] for split in SPLITS}


# ── the packaged corpus ─────────────────────────────────────────────────────


def bible_files(config: PrepareConfig, folder: Path) -> dict[str, tuple[str, ...]]:
    """Write a document for each book of each translation; the last translation's held-out books are dev and test."""
    from pema_ray.tasks.bible import check_books

    check_books((*config.books, *config.dev_books, *config.test_books))
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for name in config.translations:
        for book, verses in _books(name, config.books).items():
            held_out = name == config.translations[-1]
            split = "dev" if held_out and book in config.dev_books else (
                "test" if held_out and book in config.test_books else "train"
            )  # fmt: skip
            parts[split].append({"title": f"{book} ({name})", "text": "\n".join(verses) + "\n"})
    names: dict[str, tuple[str, ...]] = {}
    for split, documents in parts.items():
        path = folder / f"{split}.jsonl"
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
        names[split] = (str(path),)
    return names


def _books(name: str, books: tuple[str, ...]) -> dict[str, list[str]]:
    """Book -> verses, in canonical order."""
    from pema_ray.tasks.bible import translation

    verses: dict[str, list[str]] = {}
    for _, book, text in translation(name):
        if not books or book in books:
            verses.setdefault(book, []).append(text)
    return verses
