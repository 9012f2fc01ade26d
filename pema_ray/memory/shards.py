"""Writes one shard of rows atomically, and reads and checks it. N rows, H hidden.

Parquet columns: `key` (H numbers as little-endian bytes, read seven times as fast as lists; bfloat16 as its 16 bits),
`target`, `example_id`, `position`; `scale` for int8 keys; `weight` if equal rows were counted together. The file's
metadata names the number format: `key_dtype`. Lists of float32 or float16 are read as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.memory.codec import KEY_DTYPES, STORAGE, KeyDtype, Keys
from pema_ray.memory.manifest import ShardInfo
from pema_ray.runtime.files import atomic_file, sha256_of

_LISTS: dict[pa.DataType, KeyDtype] = {pa.float32(): "float32", pa.float16(): "float16"}
_FORMAT = b"key_dtype"


@dataclass(frozen=True, slots=True)
class MemoryRows:
    """Rows in memory: `key [N, H]` as stored, `target [N]` int32, `example_id [N]` int64, `position [N]` int32.

    `weight [N]` int32 is how often a row occurs; None: each once.
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
        """Rows before equal ones were counted together; None without weights."""
        return None if self.weight is None else int(self.weight.sum())

    @property
    def target_rows(self) -> int:
        """Number of rows of targets; the others are of prompts."""
        return int((self.position >= 0).sum())

    @property
    def of_targets(self) -> MemoryRows:
        """Without the rows of prompts."""
        is_target = self.position >= 0
        return self if is_target.all() else self.take(is_target)

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
    """The weights of several blocks; if only some have weights, the rows of the others have weight 1."""
    if all(part.weight is None for part in parts):
        return None
    return np.concatenate([np.ones(len(p), np.int32) if p.weight is None else p.weight for p in parts])


def write_shard(path: Path, rows: MemoryRows) -> tuple[int, str]:
    """Write rows as one Parquet file; returns `(bytes, sha256)`. Same rows, same bytes."""
    numbers = np.ascontiguousarray(rows.key.data)
    width = pa.binary(numbers.shape[1] * numbers.itemsize)
    columns = {
        "key": pa.Array.from_buffers(width, len(numbers), [None, pa.py_buffer(numbers)]),
        "target": pa.array(rows.target, pa.int32()),
        "example_id": pa.array(rows.example_id, pa.int64()),
        "position": pa.array(rows.position, pa.int32()),
    }
    if rows.key.scale is not None:
        columns["scale"] = pa.array(rows.key.scale, pa.float32())
    if rows.weight is not None:
        columns["weight"] = pa.array(rows.weight, pa.int32())
    table = pa.table(columns).replace_schema_metadata({_FORMAT: rows.key.dtype})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=False, write_statistics=False)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
    return size, digest


def save_shard(path: Path, rows: MemoryRows, examples: int, tokens: int = 0, padded_tokens: int = 0) -> ShardInfo:
    """`write_shard`; returns the shard's entry in the manifest."""
    size, digest = write_shard(path, rows)
    return ShardInfo(
        name=path.name,
        rows=rows.target_rows,
        prompt_rows=len(rows) - rows.target_rows,
        represents=rows.represents,
        examples=examples,
        tokens=tokens,
        padded_tokens=padded_tokens,
        bytes=size,
        sha256=digest,
    )


def _key_numbers(path: Path, column: pa.Array, dtype_name: bytes | None) -> tuple[KeyDtype, np.ndarray]:
    """The number format and `[N, H]` of a column of bytes, or of lists."""
    if pa.types.is_fixed_size_list(column.type) and column.type.value_type in _LISTS:
        numbers = column.flatten().to_numpy(zero_copy_only=False)
        return _LISTS[column.type.value_type], numbers.reshape(-1, column.type.list_size)
    if not pa.types.is_fixed_size_binary(column.type):
        raise UserError(f"{path}: not a readable shard: its keys are {column.type}, not numbers of one width.")
    dtype: KeyDtype | None = next((d for d in KEY_DTYPES if d.encode() == dtype_name), None)
    if dtype is None:
        raise UserError(
            f"{path}: not a readable shard: its metadata names {'no' if dtype_name is None else 'an unknown'} number "
            f"format (key_dtype); known are {', '.join(KEY_DTYPES)}. A memory of an older version: convert or build it."
        )
    width, number = column.type.byte_width, STORAGE[dtype]
    if width % number.itemsize:
        raise UserError(f"{path}: not a readable shard: its keys have {width} bytes, no whole number of {dtype}.")
    raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :][: len(column) * width]
    return dtype, raw.view(number).reshape(len(column), width // number.itemsize)


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
        table = pq.read_table(path, memory_map=True).combine_chunks()
        key = table.column("key").chunk(0) if table.num_rows else None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: not a readable shard: {str(error).splitlines()[0]}") from None
    if key is None:
        raise UserError(f"{path}: the shard holds no rows.")
    dtype, data = _key_numbers(path, key, (table.schema.metadata or {}).get(_FORMAT))
    names = ["target", "example_id", "position", *(["scale"] if dtype == "int8" else [])]
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: not a readable shard: it has no column '{missing[0]}'.")
    names += ["weight"] if "weight" in table.column_names else []
    columns = {name: table.column(name).to_numpy() for name in names}
    return MemoryRows(Keys(dtype, data, columns.pop("scale", None)), **columns)
