"""What a memory's entry is to people: text, tags, provenance. And one segment of them on disk. Knows no model.

A segment is two files that never change: `documents-<id>.parquet` (ids, tokens, text, tags, source, document id) and
`vectors-<id>-<encoder>.safetensors` (`key` [n, Q], `value` [n, D]). Encoding anew writes new vectors only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NewEntry:
    """What is put into a memory.

    Attributes:
        document_id: which document it is of; entries of one document are hidden together from texts cut from it. Empty:
            `<source>/<entry id>`.
        tags: to choose entries by, such as "in-task".
    """

    text: str
    source: str = ""
    document_id: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """What is in a memory; `entry_id` stays the same from version to version, `replace` included."""

    entry_id: int
    text: str
    source: str
    document_id: str
    tags: tuple[str, ...]
    token_ids: tuple[int, ...]
