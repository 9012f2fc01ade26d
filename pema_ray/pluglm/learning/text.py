"""Texts from Parquet and JSON Lines, by Ray Data, cut into pieces: entries of a memory, or training sequences.

Pieces keep the order of files and rows on any cluster. Shapes: N sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pema_ray.errors import UserError, nearest
from pema_ray.pluglm.config import TextConfig
from pema_ray.pluglm.memory.chunking import chunk
from pema_ray.pluglm.memory.encoding import fingerprint_of_tokenizer
from pema_ray.pluglm.model.knowledge import document_codes
from pema_ray.runtime.files import atomic_file, sha256_of

_READERS = {".parquet": "read_parquet", ".jsonl": "read_json", ".json": "read_json"}
_PLAN = "plan.json"
_SEQUENCES_PER_FILE = 1 << 17


def files_of(texts: TextConfig) -> list[Path]:
    """Absolute paths of the files. Raises `UserError` for a missing one or one of another kind."""
    if not texts.files:
        raise UserError("No text files are given (documents.files, text.files).")
    files: list[Path] = []
    for name in texts.files:
        path = Path(name)
        if path.is_dir():
            matches = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        else:
            matches = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not matches:
            raise UserError(f"{name}: no such file, and no Parquet or JSON Lines files of that name.")
        files += matches
    for path in files:
        if path.suffix not in _READERS:
            raise UserError(f"{path}: expected .parquet or .jsonl{nearest(path.suffix, list(_READERS))}.")
    return [path.absolute() for path in files]


def content_hash(texts: TextConfig, *settings: Any, checksum: Callable[[Path], str | None] = sha256_of) -> str:
    """16 hex digits of the files' contents and of settings."""
    hashed = [texts.model_dump(exclude={"files"}), [checksum(path) for path in files_of(texts)], settings]
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def has_plan(folder: Path, key: str) -> bool:
    """Whether `write_plan` wrote this key."""
    plan = folder / _PLAN
    return plan.exists() and json.loads(plan.read_text())["key"] == key


def write_plan(folder: Path, key: str) -> None:
    """Record that the folder's files are complete; `key` is a hash of their sources."""
    with atomic_file(folder / _PLAN) as temporary:
        temporary.write_text(json.dumps({"key": key}) + "\n")


def pieces(texts: TextConfig, tokenizer: Any, max_tokens: int, batch: int) -> Iterator[pa.Table]:
    """Texts cut into pieces (`chunking.chunk`), `batch` at a time, in order.

    Raises:
        UserError: a file cannot be read, a column is missing, or there is no text.
    """
    import ray

    rows = 0
    chunking: dict[str, Any] = {"config": texts, "tokenizer": tokenizer, "max_tokens": max_tokens}
    with _in_order(), _unreadable_files_as_user_errors(texts):
        data: Any = None
        for path in files_of(texts):
            part: Any = getattr(ray.data, _READERS[path.suffix])(str(path))
            _check_columns(path, part, texts)
            part = part.map_batches(chunk, fn_kwargs=chunking, batch_format="pyarrow", batch_size=1024)
            data = part if data is None else data.union(part)
        for table in data.iter_batches(batch_size=batch, batch_format="pyarrow"):
            rows += table.num_rows
            yield table
    if not rows:
        raise UserError(f"{', '.join(texts.files)}: no text in column '{texts.text_column}'.")


def _check_columns(path: Path, data: Any, texts: TextConfig) -> None:
    columns = data.schema().names if data.schema() is not None else []
    for column in (texts.text_column, texts.document_column, texts.source_column):
        if column is not None and column not in columns:
            raise UserError(f"{path}: no column '{column}'; it has {', '.join(columns)}.{nearest(column, columns)}")


@contextmanager
def _in_order() -> Iterator[None]:
    """Make Ray Data keep the order of rows."""
    import ray

    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        yield
    finally:
        options.preserve_order = before


@contextmanager
def _unreadable_files_as_user_errors(texts: TextConfig) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, pa.ArrowException, OSError) as error:
        lines = str(getattr(error, "cause", None) or error).strip().splitlines()
        raise UserError(f"{', '.join(texts.files)}: cannot be read: {lines[-1] if lines else error}") from None


# ── training sequences ──────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sequences:
    """Tokenized sequences, mapped from disk.

    Attributes:
        token: all tokens, one sequence after the other (int32).
        end: where each ends (int64).
        document: `document_code` of the document each was cut from.
    """

    token: Sequence[np.ndarray]
    end: Sequence[np.ndarray]
    document: Sequence[np.ndarray]
    first: np.ndarray
    """The number of each file's first sequence."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """(token ids, document code)."""
        file = int(np.searchsorted(self.first, number, side="right")) - 1
        row = number - int(self.first[file])
        end = self.end[file]
        begin = int(end[row - 1]) if row else 0
        return self.token[file][begin : int(end[row])], int(self.document[file][row])

    def place(self, number: int) -> float:
        """A sequence's relative position in its document, from 0 to 1: its middle, as if all were equally long."""
        begin, end = self._run_N[number]
        return (number - begin + 0.5) / (end - begin)

    @cached_property
    def _run_N(self) -> np.ndarray:
        """(first, last + 1) sequence `[N, 2]` of each sequence's document."""
        document_N = np.concatenate([np.zeros(0, np.int64), *self.document])
        border = np.flatnonzero(np.diff(document_N)) + 1
        begin, end = np.concatenate([[0], border]), np.concatenate([border, [len(document_N)]])
        return np.stack([begin, end], 1).repeat(end - begin, 0)

    @classmethod
    def open(cls, folder: Path) -> Sequences:
        """The files of `prepare_sequences`."""
        token, end, document = [], [], []
        for path in sorted(folder.glob("sequences-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name, parts in (("token", token), ("end", end), ("document", document)):
                    parts.append(file.get_tensor(name).numpy())
        return cls(token, end, document, np.cumsum([0, *map(len, end)]))


def prepare_sequences(folder: Path, texts: TextConfig, tokenizer: Any, max_tokens: int) -> Sequences:
    """Tokenize texts into `folder`, unless that was done before. Raises as `pieces` does."""
    key = content_hash(texts, fingerprint_of_tokenizer(tokenizer), max_tokens)
    if not has_plan(folder, key):
        (folder / _PLAN).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("sequences-*.safetensors"):
            file.unlink()
        for number, table in enumerate(pieces(texts, tokenizer, max_tokens, _SEQUENCES_PER_FILE)):
            _write(folder / f"sequences-{number:05d}.safetensors", table)
        write_plan(folder, key)
    return Sequences.open(folder)


def _write(path: Path, table: pa.Table) -> None:
    column = table["token_ids"].combine_chunks()
    length = np.asarray(column.value_lengths())
    tensors = {
        "token": torch.from_numpy(column.flatten().to_numpy().astype(np.int32)),
        "end": torch.from_numpy(length.cumsum().astype(np.int64)),
        "document": torch.from_numpy(document_codes(table["document_id"].to_pylist())),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)
