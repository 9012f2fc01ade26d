"""Damage of any kind to a memory's files is a named error: never a crash, never rows that are not those written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory, MemoryRows
from pema_ray.memory.codec import KEY_DTYPES, encode
from pema_ray.memory.manage import verify
from tests.memory.kit import write_memory

DTYPES = st.sampled_from(KEY_DTYPES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder of one memory for each number format, three shards each; every other one has weights."""
    root = tmp_path_factory.mktemp("sound")
    for place, dtype in enumerate(KEY_DTYPES):
        random, blocks = np.random.default_rng(place), []
        for number in range(3):
            ids = np.arange(number * 20, (number + 1) * 20)
            key = encode(random.normal(size=(20, 6)).astype(np.float32), dtype)
            weight = random.integers(1, 4, 20, dtype=np.int32) if place % 2 else None
            target = random.integers(0, 300, 20, dtype=np.int32)
            blocks.append(MemoryRows(key, target, ids, np.zeros(20, np.int32), weight))
        write_memory(root / dtype, blocks)
    return root


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path / "damaged"


def damaged_copy(sound: Path, dtype: str, room: Path) -> Path:
    shutil.rmtree(room, ignore_errors=True)
    shutil.copytree(sound / dtype, room)
    return room


def assert_named_or_unchanged(folder: Path, original: Path) -> None:
    """Reading either fails with an error that names the folder, or returns exactly the rows that were written."""
    try:
        memory = ExternalMemory.open(folder)
        rows = memory.load()
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)  # noqa: PT017
        return
    written = ExternalMemory.open(original)
    assert memory.manifest == written.manifest
    expected = written.load()
    for name in ("target", "example_id", "position", "weight"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name))
    np.testing.assert_array_equal(rows.key[:], expected.key[:])


def change(path: Path, data: st.DataObject) -> None:
    """Flip bits, cut, lengthen, empty, or overwrite a stretch."""
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "empty", "stretch"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    elif kind == "longer":
        content += data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "empty":
        content.clear()
    else:
        content[at : at + 16] = data.draw(st.binary(min_size=1, max_size=16))
    path.write_bytes(content)


@settings(max_examples=250)
@given(data=st.data(), dtype=DTYPES)
def test_a_shard_that_is_not_what_was_written_is_refused(sound: Path, tmp_path_factory, data, dtype: str):
    folder = damaged_copy(sound, dtype, tmp_path_factory.getbasetemp() / "fuzzed-shard")
    change(folder / f"shard-{data.draw(st.integers(0, 2)):05d}.parquet", data)
    assert_named_or_unchanged(folder, sound / dtype)


@settings(max_examples=250)
@given(data=st.data(), dtype=DTYPES)
def test_a_shard_is_read_without_a_crash_when_its_checksum_is_not_asked(
    sound: Path, tmp_path_factory, data, dtype: str
):
    folder = damaged_copy(sound, dtype, tmp_path_factory.getbasetemp() / "fuzzed-blind")
    memory, number = ExternalMemory.open(folder), data.draw(st.integers(0, 2))
    change(folder / f"shard-{number:05d}.parquet", data)
    try:
        rows = memory.shard(memory.manifest.shards[number], verify=False)
    except UserError as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        assert rows.key.shape == (20, 6)


@settings(max_examples=250)
@given(data=st.data(), dtype=DTYPES)
def test_a_manifest_that_is_not_what_was_written_is_refused(sound: Path, tmp_path_factory, data, dtype: str):
    folder = damaged_copy(sound, dtype, tmp_path_factory.getbasetemp() / "fuzzed-manifest")
    change(folder / "manifest.json", data)
    assert_named_or_unchanged(folder, sound / dtype)


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_swapped_files_are_refused_and_verify_names_each(sound: Path, room: Path, dtype: str):
    folder = damaged_copy(sound, dtype, room)
    assert verify(folder) == []
    one, two = folder / "shard-00000.parquet", folder / "shard-00002.parquet"
    kept = one.read_bytes()
    shutil.copy(two, one)
    two.write_bytes(kept)
    with pytest.raises(UserError, match="shard-00000.parquet: damaged shard"):
        ExternalMemory.open(folder).load()
    problems = verify(folder)
    assert len(problems) == 2 and "shard-00000" in problems[0] and "shard-00002" in problems[1]


def test_the_manifest_of_another_memory_is_refused(sound: Path, room: Path):
    folder = damaged_copy(sound, "float32", room)
    shutil.copy(sound / "float16" / "manifest.json", folder / "manifest.json")
    with pytest.raises(UserError, match="shard-00000.parquet: damaged shard"):
        ExternalMemory.open(folder).load()
