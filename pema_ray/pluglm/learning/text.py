"""Texts from Parquet and JSON Lines, by Ray Data: cut into pieces, as a memory's entries or as training sequences.

The order of pieces is that of files and rows, whatever the cluster. Shapes: N sequences.
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
from pema_ray.pluglm.memory.chunking import Cutter
from pema_ray.pluglm.memory.encoding import fingerprint_of_tokenizer
from pema_ray.pluglm.model.knowledge import document_codes
from pema_ray.runtime.files import atomic_file, sha256_of

_READERS = {".parquet": "read_parquet", ".jsonl": "read_json", ".json": "read_json"}
_PLAN = "plan.json"
_SEQUENCES_PER_FILE = 1 << 17


def files_of(texts: TextConfig) -> list[Path]:
    """The files that are meant, absolute. Raises `UserError` for one that is not there or of another kind."""
    if not texts.files:
        raise UserError("No text files are given (documents.files, text.files).")
    found: list[Path] = []
    for name in texts.files:
        path = Path(name)
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix in _READERS)
        else:
            inside = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not inside:
            raise UserError(f"{name}: no such file, and no Parquet or JSON Lines files of that name.")
        found += inside
    for path in found:
        if path.suffix not in _READERS:
            raise UserError(f"{path}: expected .parquet or .jsonl{nearest(path.suffix, list(_READERS))}.")
    return [path.absolute() for path in found]


def content_hash(texts: TextConfig, *settings: Any, checksum: Callable[[Path], str | None] = sha256_of) -> str:
    """16 hex digits of what the files hold and of settings."""
    told = [texts.model_dump(exclude={"files"}), [checksum(path) for path in files_of(texts)], settings]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def pieces(texts: TextConfig, tokenizer: Any, most: int, batch: int) -> Iterator[pa.Table]:
    """Texts cut into pieces of at most `most` tokens, `batch` at a time, in order.

    Columns: `text`, `token_ids`, `document_id`, `source`. Blank texts are left out.

    Raises:
        UserError: a file cannot be read, a column is missing, or there is no text at all.
    """
    import ray

    rows = 0
    with _in_order(), _refusing_unreadable_files(texts):
        data: Any = None
        for path in files_of(texts):
            part: Any = getattr(ray.data, _READERS[path.suffix])(str(path))
            _check_columns(path, part, texts)
            part = part.map_batches(Cutter(texts, tokenizer, most), batch_format="pyarrow", batch_size=1024)
            data = part if data is None else data.union(part)
        for table in data.iter_batches(batch_size=batch, batch_format="pyarrow"):
            rows += table.num_rows
            yield table
    if not rows:
        raise UserError(f"{', '.join(texts.files)}: no text in column '{texts.text_column}'.")


def _check_columns(path: Path, data: Any, texts: TextConfig) -> None:
    known = data.schema().names if data.schema() is not None else []
    for column in (texts.text_column, texts.document_column, texts.source_column):
        if column is not None and column not in known:
            raise UserError(f"{path}: no column '{column}'; it has {', '.join(known)}.{nearest(column, known)}")


@contextmanager
def _in_order() -> Iterator[None]:
    """Ray Data keeps the order of rows while the block runs."""
    import ray

    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        yield
    finally:
        options.preserve_order = before


@contextmanager
def _refusing_unreadable_files(texts: TextConfig) -> Iterator[None]:
    """What Ray Data cannot read is the user's file."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, pa.ArrowException, OSError) as error:
        told = str(getattr(error, "cause", None) or error).strip().splitlines()
        raise UserError(f"{', '.join(texts.files)}: cannot be read: {told[-1] if told else error}") from None


# ── training sequences ──────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sequences:
    """Tokenized sequences, mapped from disk.

    Attributes:
        token: all tokens, one sequence after the other (int32).
        end_N: where each ends (int64).
        document_N: `document_code` of the document each was cut from.
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
        """How far into its document a sequence lies: the middle of its share of it, as if all were equally long."""
        begin, end = self._run_N[number]
        return (number - begin + 0.5) / (end - begin)

    @cached_property
    def _run_N(self) -> np.ndarray:
        """(first, behind the last) sequence `[N, 2]` of the neighbours that were cut from the same document."""
        document_N = np.concatenate([np.zeros(0, np.int64), *self.document])
        border = np.flatnonzero(np.diff(document_N)) + 1
        begin, end = np.concatenate([[0], border]), np.concatenate([border, [len(document_N)]])
        return np.stack([begin, end], 1).repeat(end - begin, 0)

    @classmethod
    def open(cls, folder: Path) -> Sequences:
        """What `prepare_sequences` left."""
        token, end, document = [], [], []
        for path in sorted(folder.glob("sequences-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name, parts in (("token", token), ("end", end), ("document", document)):
                    parts.append(file.get_tensor(name).numpy())
        return cls(token, end, document, np.cumsum([0, *map(len, end)]))


def prepare_sequences(folder: Path, texts: TextConfig, tokenizer: Any, most: int) -> Sequences:
    """Tokenize texts into `folder`, unless that was done before. Raises as `pieces` does."""
    key = content_hash(texts, fingerprint_of_tokenizer(tokenizer), most)
    plan = folder / _PLAN
    if not plan.exists() or json.loads(plan.read_text())["key"] != key:
        plan.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("sequences-*.safetensors"):
            old.unlink()
        for number, table in enumerate(pieces(texts, tokenizer, most, _SEQUENCES_PER_FILE)):
            _write(folder / f"sequences-{number:05d}.safetensors", table)
        with atomic_file(plan) as temporary:
            temporary.write_text(json.dumps({"key": key}) + "\n")
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
