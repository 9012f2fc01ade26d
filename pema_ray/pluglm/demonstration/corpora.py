"""Texts of a domain: the packaged Bible, a dictionary of Debian's `dict-*` packages, or a file. Knows no model.

A text is a chapter, a dictionary's entry, a row, or a paragraph of a plain file.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pema_ray.errors import UserError

FOLDOC = "/usr/share/dictd/foldoc.dict.dz"
"""Path of Debian's `dict-foldoc`, a dictionary of computing."""
TRANSLATIONS = ("kjv", "web")
_DIGITS = {digit: n for n, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_ABOUT = ("00database", "00-database")  # headwords of a dictionary's metadata
_CHAPTER = 1000  # a verse number is BBCCCVVV


@dataclass(frozen=True)
class Domain:
    """Texts of one kind; held-out ones are used neither for training nor for memories."""

    name: str
    learned: tuple[str, ...]
    held_out: tuple[str, ...]


def read_domain(name: str, share: float, seed: int) -> Domain:
    """A domain with a share of its texts held out, drawn by the seed.

    Args:
        name: `kjv` or `web` (packages `pythonbible-…`), a dictionary (.dict or .dict.dz, its .index beside it), or
            .jsonl, .parquet (column `text`) or .txt (paragraphs).

    Raises:
        UserError: it cannot be read, or has too few texts to hold any out.
    """
    texts = _bible(name) if name in TRANSLATIONS else _file(Path(name))
    texts = list(dict.fromkeys(text for text in texts if text.strip()))  # the memory must not hold a held-out copy
    count = round(share * len(texts))
    if not 0 < count < len(texts):
        raise UserError(f"{name}: {len(texts)} different texts, too few to hold {share:.0%} of them out.")
    held_out = set(np.random.default_rng(seed).choice(len(texts), count, replace=False).tolist())
    parts = [tuple(text for n, text in enumerate(texts) if (n in held_out) == part) for part in (False, True)]
    return Domain(name if name in TRANSLATIONS else Path(name).name.split(".")[0], *parts)


def _bible(name: str) -> list[str]:
    from pema_ray.tasks.bible import translation

    chapters: dict[int, list[str]] = {}
    for number, _, text in translation(name):
        chapters.setdefault(number // _CHAPTER, []).append(text)
    return [" ".join(verses) for verses in chapters.values()]


def _file(path: Path) -> list[str]:
    if not path.is_file():
        hint = " Install Debian's package dict-foldoc, or name another file." if str(path) == FOLDOC else ""
        raise UserError(
            f"{path}: no such file.{hint} A domain is {', '.join(TRANSLATIONS)}, a .dict.dz, .jsonl, .parquet or .txt."
        )
    if path.name.endswith((".dict.dz", ".dict")):
        return _dictionary(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return [str(text) for text in pq.read_table(path, columns=["text"])["text"].to_pylist() if text]
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as rows with 'text': {error}.") from None
    if path.suffix != ".txt":
        raise UserError(f"{path}: expected .jsonl, .parquet, .txt, .dict or .dict.dz.")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _dictionary(path: Path) -> list[str]:
    """Entries of dictd's format: the index gives places in the text as base-64 numbers."""
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    try:
        with gzip.open(path) if path.suffix == ".dz" else path.open("rb") as file:
            body = file.read()
        rows = [line.split("\t") for line in index.read_text(encoding="utf-8").splitlines()]
        places = sorted({(_number(row[1]), _number(row[2])) for row in rows if not row[0].startswith(_ABOUT)})
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: no dictionary of dictd's format with {index.name} beside it: {error!r}.") from None
    return [" ".join(body[start : start + size].decode("utf-8", "replace").split()) for start, size in places]


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value
