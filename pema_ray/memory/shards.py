"""Writes one shard of rows, atomically, and reads it back, checked. N rows, H hidden.

Parquet columns: `key` (fixed-size list of H numbers; bytes for int8 and bfloat16), `target`, `example_id`,
`position`; `scale` for int8 keys;
`weight` where equal rows were counted together.
Plain pyarrow reads them; bfloat16 keys are their 16 bits, little-endian.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.memory.codec import KeyDtype, Keys

_ARROW: dict[KeyDtype, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
}
_AS_BYTES: dict[KeyDtype, type] = {"bfloat16": np.uint16, "int8": np.int8}


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """Rows in memory: `key [N, H]` as stored, `target [N]` int32, `example_id [N]` int64, `position [N]` int32.

    `weight [N]` int32 says how often a row occurs; None: each once.
    """

    key: Keys
    target: np.ndarray
    example_id: np.ndarray
    position: np.ndarray
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def nbytes(self) -> int:
        plain = (self.target, self.example_id, self.position, *(() if self.weight is None else (self.weight,)))
        return self.key.nbytes + sum(array.nbytes for array in plain)

    @property
    def represents(self) -> int | None:
        """Rows before equal ones were counted together; none without weights."""
        return None if self.weight is None else int(self.weight.sum())

    @property
    def target_rows(self) -> int:
        """How many are of targets; the others are of prompts."""
        return int((self.position >= 0).sum())

    @property
    def of_targets(self) -> MemoryRows:
        """Without the rows of prompts."""
        found = self.position >= 0
        return self if found.all() else self.take(found)

    def take(self, index: np.ndarray | slice) -> MemoryRows:
        weight = None if self.weight is None else self.weight[index]
        return MemoryRows(
            self.key.take(index), self.target[index], self.example_id[index], self.position[index], weight
        )

    @classmethod
    def concatenate(cls, parts: list[MemoryRows]) -> MemoryRows:
        keys = Keys.concatenate([part.key for part in parts])
        target, example_id, position = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("target", "example_id", "position")
        )
        return cls(keys, target, example_id, position, weights_of(parts))


def weights_of(parts: Sequence[MemoryRows]) -> np.ndarray | None:
    """The weights of several blocks; where only some have any, the rows of the others occur once."""
    if all(part.weight is None for part in parts):
        return None
    return np.concatenate([np.ones(len(p), np.int32) if p.weight is None else p.weight for p in parts])


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place on success and vanishes on any failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}. Start again when it can; what is finished is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, rows: MemoryRows) -> tuple[int, str]:
    """Write rows as one Parquet file; returns `(bytes, sha256)`. Same rows, same bytes."""
    columns = {
        "key": _key_column(rows.key),
        "target": pa.array(rows.target, pa.int32()),
        "example_id": pa.array(rows.example_id, pa.int64()),
        "position": pa.array(rows.position, pa.int32()),
    }
    if rows.key.scale is not None:
        columns["scale"] = pa.array(rows.key.scale, pa.float32())
    if rows.weight is not None:
        columns["weight"] = pa.array(rows.weight, pa.int32())
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="none", use_dictionary=False, write_statistics=False)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
    return size, digest


def _key_column(keys: Keys) -> pa.Array:
    """Lists of numbers where Parquet has the number, else bytes: it would keep an int8 or uint16 in four of them."""
    data = np.ascontiguousarray(keys.data)
    if keys.dtype in _AS_BYTES:
        width = data.shape[1] * data.itemsize
        return pa.Array.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data)])
    return pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1), type=_ARROW[keys.dtype]), data.shape[1])


def _key_numbers(path: Path, column: pa.Array, scaled: bool) -> tuple[KeyDtype, np.ndarray]:
    """What `_key_column` wrote: the number format and `[N, H]`."""
    if pa.types.is_fixed_size_binary(column.type):
        dtype: KeyDtype = "int8" if scaled else "bfloat16"
        width, number = column.type.byte_width, np.dtype(_AS_BYTES[dtype])
        if width % number.itemsize:
            raise UserError(f"{path}: not a readable shard: its keys have {width} bytes, no whole number of {dtype}.")
        raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :][: len(column) * width]
        return dtype, raw.view(number).reshape(len(column), width // number.itemsize)
    if not pa.types.is_fixed_size_list(column.type):
        raise UserError(f"{path}: not a readable shard: its keys are {column.type}, not lists of one length.")
    found: KeyDtype | None = next((name for name, arrow in _ARROW.items() if arrow == column.type.value_type), None)
    if found is None:
        known = ", ".join((*_ARROW, *_AS_BYTES))
        raise UserError(f"{path}: not a readable shard: keys of {column.type.value_type}; known are {known}.")
    return found, column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)


def read_shard(path: Path, sha256: str | None = None) -> MemoryRows:
    """Read one shard, checking it against its checksum when one is given.

    Raises:
        UserError: the file is missing, damaged or not a shard.
    """
    if not path.exists():
        raise UserError(f"{path}: this shard is missing. Run build-memory again: it makes only what is missing.")
    if sha256 is not None and sha256_of(path) != sha256:
        raise UserError(
            f"{path}: damaged shard (its checksum is not the manifest's). Delete it and run build-memory again."
        )
    try:
        table = pq.read_table(path).combine_chunks()
        key = table.column("key").chunk(0) if table.num_rows else None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: not a readable shard: {str(error).splitlines()[0]}") from None
    if key is None:
        raise UserError(f"{path}: the shard holds no rows.")
    dtype, data = _key_numbers(path, key, "scale" in table.column_names)
    names = ["target", "example_id", "position", *(["scale"] if dtype == "int8" else [])]
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: not a readable shard: it has no column '{missing[0]}'.")
    names += ["weight"] if "weight" in table.column_names else []
    plain = {name: table.column(name).to_numpy() for name in names}
    return MemoryRows(Keys(dtype, data, plain.pop("scale", None)), **plain)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
