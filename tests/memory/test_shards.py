"""A shard is written atomically, reads back bit for bit, and damage is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pema_ray.errors import UserError
from pema_ray.memory.codec import KEY_DTYPES, KeyDtype, encode
from pema_ray.memory.shards import MemoryRows, read_shard, write_shard
from pema_ray.runtime.files import atomic_file, sha256_of

H = 5


def some_rows(count: int = 7, dtype: KeyDtype = "float32", seed: int = 0) -> MemoryRows:
    random = np.random.default_rng(seed)
    return MemoryRows(
        key=encode(random.standard_normal((count, H)), dtype),
        target=random.integers(0, 2**31 - 1, count, dtype=np.int32),
        example_id=random.integers(0, 2**62, count, dtype=np.int64),
        position=np.arange(count, dtype=np.int32),
    )


def assert_same(actual: MemoryRows, expected: MemoryRows) -> None:
    assert actual.key.dtype == expected.key.dtype
    pairs = [(actual.key.data, expected.key.data), (actual.key.scale, expected.key.scale)]
    pairs += [(getattr(actual, field), getattr(expected, field)) for field in ("target", "example_id", "position")]
    for a, b in pairs:
        if a is None:
            assert b is None
            continue
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@settings(max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(KEY_DTYPES))
def test_any_rows_read_back_bit_for_bit(tmp_path_factory, data, dtype: KeyDtype):
    numbers = st.floats(-60_000, 60_000, width=32)
    key = data.draw(arrays.arrays("float32", st.tuples(st.integers(1, 9), st.integers(1, 6)), elements=numbers))
    rows = some_rows(len(key))
    rows = MemoryRows(encode(key, dtype), rows.target, rows.example_id, rows.position)
    path = tmp_path_factory.mktemp("shard") / "s.parquet"
    size, digest = write_shard(path, rows)
    assert (size, digest) == (path.stat().st_size, sha256_of(path))
    assert_same(read_shard(path, digest), rows)


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_plain_pyarrow_reads_a_shard(dtype: KeyDtype, tmp_path: Path):
    rows = some_rows(dtype=dtype)
    write_shard(tmp_path / "s.parquet", rows)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["key", "target", "example_id", "position"] + ["scale"] * (dtype == "int8")
    assert table.schema.metadata[b"key_dtype"].decode() == dtype
    keys = [np.frombuffer(key, rows.key.data.dtype).tolist() for key in table.column("key").to_pylist()]
    assert keys == rows.key.data.tolist()
    assert (tmp_path / "s.parquet").stat().st_size < rows.key.nbytes + 2500 + 24 * len(rows)
    assert table.column("target").to_pylist() == rows.target.tolist()


def test_same_rows_same_bytes_and_other_rows_other_bytes(tmp_path: Path):
    first = write_shard(tmp_path / "a.parquet", some_rows())
    view = some_rows(14).take(slice(0, 14, 2))  # not contiguous
    plain = (getattr(view, field).copy() for field in ("target", "example_id", "position"))
    copy = MemoryRows(encode(view.key[:], "float32"), *plain)
    assert write_shard(tmp_path / "b.parquet", some_rows()) == first
    assert write_shard(tmp_path / "c.parquet", view) == write_shard(tmp_path / "d.parquet", copy)
    assert write_shard(tmp_path / "e.parquet", some_rows(seed=1))[1] != first[1]


def test_a_changed_byte_is_noticed(tmp_path: Path):
    path = tmp_path / "s.parquet"
    _, digest = write_shard(path, some_rows())
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="s.parquet: damaged shard .*Delete it and run build-memory again"):
        read_shard(path, digest)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_truncated_shard_is_refused_with_and_without_its_checksum(keep: int, tmp_path: Path):
    path = tmp_path / "s.parquet"
    _, digest = write_shard(path, some_rows())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged shard"):
        read_shard(path, digest)
    with pytest.raises(UserError, match="not a readable shard"):
        read_shard(path)


def test_missing_swapped_and_foreign_files_are_refused(tmp_path: Path):
    _, digest = write_shard(tmp_path / "a.parquet", some_rows())
    write_shard(tmp_path / "b.parquet", some_rows(seed=1))
    with pytest.raises(UserError, match="gone.parquet: this shard is missing"):
        read_shard(tmp_path / "gone.parquet", digest)
    with pytest.raises(UserError, match="b.parquet: damaged shard"):
        read_shard(tmp_path / "b.parquet", digest)
    pq.write_table(pa.table({"word": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="not a readable shard"):
        read_shard(tmp_path / "other.parquet")
    pq.write_table(
        pa.table({"key": [1.0], "target": [1], "example_id": [1], "position": [1]}), tmp_path / "flat.parquet"
    )
    with pytest.raises(UserError, match="not a readable shard"):
        read_shard(tmp_path / "flat.parquet")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_keys_in_lists_are_read_too(dtype: KeyDtype, tmp_path: Path):
    rows = some_rows(dtype=dtype)
    columns = {"key": pa.FixedSizeListArray.from_arrays(rows.key.data.reshape(-1), rows.key.shape[1])}
    columns |= {name: pa.array(getattr(rows, name)) for name in ("target", "example_id", "position")}
    pq.write_table(pa.table(columns), tmp_path / "lists.parquet")
    assert_same(read_shard(tmp_path / "lists.parquet"), rows)


@pytest.mark.parametrize(
    ("named", "width", "problem"),
    [
        (None, 8, "names no number format"),
        (b"float8", 8, "names an unknown number"),
        (b"float32", 6, "no whole number"),
    ],
)
def test_bytes_without_a_known_number_format_are_refused(named, width: int, problem: str, tmp_path: Path):
    columns = {"key": pa.array([b"x" * width], pa.binary(width))}
    columns |= {"target": pa.array([1]), "example_id": pa.array([1]), "position": pa.array([1])}
    table = pa.table(columns).replace_schema_metadata(None if named is None else {"key_dtype": named})
    pq.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=f"bytes.parquet: not a readable shard: .*{problem}"):
        read_shard(tmp_path / "bytes.parquet")


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["pema_ray.memory.shards.pq.write_table", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_nothing_half_written(step: str, tmp_path: Path, monkeypatch):
    before = write_shard(tmp_path / "done.parquet", some_rows())
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(UserError, match="new.parquet: cannot be written: No space left on device. Start again"):
        write_shard(tmp_path / "new.parquet", some_rows(seed=1))
    assert os.listdir(tmp_path) == ["done.parquet"]
    assert_same(read_shard(tmp_path / "done.parquet", before[1]), some_rows())


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path):
    (tmp_path / "file").write_text("old")

    def interrupted() -> None:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_taking_and_concatenating_rows_keeps_them_together():
    rows = some_rows(6)
    parts = [rows.take(slice(0, 2)), rows.take(np.array([2, 3, 4])), rows.take(slice(5, 6))]
    assert_same(MemoryRows.concatenate(parts), rows)
    assert len(rows) == 6
