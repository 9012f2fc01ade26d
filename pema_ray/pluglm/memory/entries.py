"""Entries of a memory (text, tags, provenance), and segments of them on disk. Knows no model.

A segment is two files that never change: `documents-<hash>.parquet` (entry id, text, source, document id, tags, token
ids) and `vectors-<hash>-<encoder>-<dtype>.safetensors` (`key` [n, Q], `value` [n, D]). Encoding again writes other
vectors beside the same documents. Names follow from contents, so an interrupted build's files are reused.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.model.knowledge import document_codes
from pema_ray.runtime.files import atomic_file, sha256_of
from pema_ray.runtime.hardware import DTYPES
from pema_ray.runtime.settings import Section

VectorDtype = Literal["float32", "float16", "bfloat16"]
_CONTENTS = "sha256"  # header field of a vectors file: checksum of its numbers
_WRITING = threading.Lock()
VECTOR_DTYPES: tuple[VectorDtype, ...] = get_args(VectorDtype)


@dataclass(frozen=True, slots=True)
class NewEntry:
    """An entry to be written.

    Attributes:
        document_id: the document it was cut from, if any; texts of the same document can exclude it from retrieval.
        tags: for filters, such as "in-task".
    """

    text: str
    source: str = ""
    document_id: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a memory; `entry_id` stays the same from version to version, `replace` included."""

    entry_id: int
    text: str
    source: str
    document_id: str
    tags: tuple[str, ...]
    token_ids: tuple[int, ...]


def read_entries(path: Path) -> list[NewEntry]:
    """Entries from JSON Lines: `text`, optional `source`, `document_id`, `tags`. `UserError` names a wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            tags = row.pop("tags", [])
            if isinstance(tags, str) or not all(isinstance(value, str) for value in (*row.values(), *tags)):
                raise TypeError("text, source and document_id are strings, tags a list of them")
            entries.append(NewEntry(**row, tags=tuple(tags)))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: no entry: {str(error).removeprefix('NewEntry.__init__() ')}."
            ) from None
    return entries


class FileInfo(Section):
    """A file of the memory's folder."""

    name: str
    bytes: int
    sha256: str


class Segment(Section):
    """Entries that were written together, in one version."""

    documents: FileInfo
    vectors: FileInfo
    rows: int
    first_id: int
    """The lowest entry id in the file."""
    last_id: int
    """The highest."""
    id_offset: int = 0
    """Added to the ids in the file; `concat` gives entries new ids by it."""
    dropped: tuple[int, ...] = ()
    """Rows that this version no longer has."""

    @property
    def entries(self) -> int:
        return self.rows - len(self.dropped)


SCHEMA = pa.schema(
    {
        "entry_id": pa.int64(),
        "text": pa.string(),
        "source": pa.string(),
        "document_id": pa.string(),
        "document": pa.int64(),  # `document_code` of the id
        "tags": pa.list_(pa.string()),
        "token_ids": pa.list_(pa.int32()),
    }
)


def write_documents(
    folder: Path, entries: Sequence[NewEntry], token_ids: Sequence[Sequence[int]], entry_ids: Sequence[int]
) -> FileInfo:
    """Write entries to a file that never changes again."""
    columns: dict[str, Any] = {
        "entry_id": entry_ids,
        "text": [entry.text for entry in entries],
        "source": [entry.source for entry in entries],
        "document_id": [entry.document_id for entry in entries],
        "document": document_codes([entry.document_id for entry in entries]),
        "tags": [list(entry.tags) for entry in entries],
        "token_ids": token_ids,
    }
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in zip(SCHEMA.names, SCHEMA.types)}, SCHEMA)
    digest = hashlib.sha256()
    for batch in table.to_batches():
        for value in (batch.schema.serialize(), batch.serialize()):
            digest.update(value)
    path = folder / f"documents-{digest.hexdigest()[:16]}.parquet"
    with _WRITING:
        if not _holds(path, table):
            with atomic_file(path) as temporary:
                pq.write_table(table, temporary, compression="zstd")
    return described(path)


def _holds(path: Path, table: pa.Table) -> bool:
    """Whether a file holds this table; a damaged file is written again."""
    try:
        return path.exists() and pq.read_table(path).equals(table)
    except (pa.ArrowException, OSError):
        return False


def write_vectors(
    folder: Path, documents: FileInfo, digest: str, dtype: str, key_NQ: Tensor, value_ND: Tensor
) -> FileInfo:
    """Write keys and values of a segment's documents, made by the encoder with this digest.

    Raises:
        UserError: a number is not finite, or does not fit the format.
    """
    path = vectors_path(folder, documents, digest, dtype)
    tensors = {"key": key_NQ.to(DTYPES[dtype]).contiguous(), "value": value_ND.to(DTYPES[dtype]).contiguous()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{path}: a {name} is not finite in {dtype}. Use another number format (bfloat16 has float32's range), "
                "or another encoder: this one may have diverged."
            )
    with _WRITING:
        if not are_sound_vectors(path):
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, {_CONTENTS: tensors_hash(tensors)})
    return described(path)


def are_sound_vectors(path: Path) -> bool:
    """Whether a complete, undamaged file of vectors is there: it carries a checksum of its numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("key", "value")}
            return (file.metadata() or {}).get(_CONTENTS) == tensors_hash(tensors)
    except (SafetensorError, OSError):
        return False


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def vectors_path(folder: Path, documents: FileInfo, digest: str, dtype: str) -> Path:
    """Path of the vectors of these documents."""
    stem = documents.name.removeprefix("documents-").removesuffix(".parquet")
    return folder / f"vectors-{stem}-{digest}-{dtype}.safetensors"


def read_documents(folder: Path, info: FileInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a segment's documents. Raises `UserError` if the file is missing or damaged."""
    path = folder / info.name
    _require(path, info)
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns), memory_map=True).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        what = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable: {what}. Restore this file, or swap back to an older version.") from None


def read_vectors(folder: Path, info: FileInfo) -> tuple[Tensor, Tensor]:
    """(keys `[n, Q]`, values `[n, D]`) as stored, mapped from disk."""
    path = folder / info.name
    _require(path, info)
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("key"), file.get_tensor("value")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable: {error}. Encode anew: pema-ray pluglm memory refresh.") from None


def described(path: Path) -> FileInfo:
    return FileInfo(name=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _require(path: Path, info: FileInfo) -> None:
    if not path.exists():
        raise UserError(f"{path}: this file of the memory is missing. Was its version pruned?")
    if path.stat().st_size != info.bytes:
        raise UserError(f"{path}: damaged: {path.stat().st_size:,} bytes, the version says {info.bytes:,}.")
