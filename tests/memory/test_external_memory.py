"""An opened memory is the one its manifest describes, for the PLM that built it, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory, MemoryRows, shards
from pema_ray.memory.codec import encode
from tests.memory.kit import write_memory

H = 3
CARD = ModelCard("tiny", "a" * 16, H, 50, 96, (1,))
LENGTHS = [3, 1, 2, 4, 2]  # rows of each example
PER_SHARD = 2


def block(examples: list[int]) -> MemoryRows:
    ids = np.concatenate([np.full(LENGTHS[e], e, np.int64) for e in examples])
    position = np.concatenate([np.arange(LENGTHS[e], dtype=np.int32) for e in examples])
    key = np.stack([ids, position, ids * 10 + position], axis=1).astype(np.float32)
    return MemoryRows(encode(key, "float32"), (ids * 10 + position).astype(np.int32), ids, position)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    examples = range(len(LENGTHS))
    blocks = [block(list(examples[start : start + PER_SHARD])) for start in examples[::PER_SHARD]]
    return write_memory(tmp_path, blocks, vocab_size=50).folder


def test_all_rows_come_back_in_order(folder: Path):
    memory, expected = ExternalMemory.open(folder, CARD), block([0, 1, 2, 3, 4])
    assert len(memory) == 12
    assert np.array_equal(memory.load().key[:], expected.key[:])
    for field in ("target", "example_id", "position"):
        assert np.array_equal(getattr(memory.load(), field), getattr(expected, field))
    assert [len(rows) for rows in memory.shards()] == [4, 6, 2]


@pytest.mark.parametrize("examples", range(1, 8))
def test_max_examples_takes_the_first_whole_examples(folder: Path, examples: int):
    rows = ExternalMemory.open(folder).load(max_examples=examples)
    kept = range(min(examples, 5))
    assert np.array_equal(rows.target, block(list(kept)).target)


@pytest.mark.parametrize("count", range(1, 15))
def test_max_rows_takes_the_first_rows(folder: Path, count: int):
    rows = ExternalMemory.open(folder).load(max_rows=count)
    assert np.array_equal(rows.target, block([0, 1, 2, 3, 4]).target[:count])


def test_both_limits_hold_together(folder: Path):
    memory = ExternalMemory.open(folder)
    assert len(memory.load(max_examples=3, max_rows=5)) == 5
    assert len(memory.load(max_examples=3, max_rows=50)) == 6


def test_another_plm_is_refused_and_both_are_named(folder: Path):
    card = ModelCard("huge", "b" * 16, H, 50, 96, (1,))
    with pytest.raises(FingerprintMismatch) as caught:
        ExternalMemory.open(folder, card)
    assert "tiny (aaaaaaaaaaaaaaaa)" in str(caught.value) and "huge (bbbbbbbbbbbbbbbb)" in str(caught.value)
    assert ExternalMemory.open(folder, ModelCard("renamed", "a" * 16, H, 50, 96, (1,)))


def test_a_missing_and_a_damaged_memory_have_different_errors(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no external memory here .*Run build-memory"):
        ExternalMemory.open(tmp_path / "nowhere")
    path = folder / "manifest.json"
    text = path.read_text()
    fields = json.loads(text)
    del fields["rows"]
    for damage in (text[:100], "", "[]", json.dumps(fields), '{"schema_version": "x"}'):
        path.write_text(damage)
        with pytest.raises(UserError, match="damaged manifest: .*Run build-memory again"):
            ExternalMemory.open(folder)
    path.write_text(json.dumps(json.loads(text) | {"schema_version": 1}))
    with pytest.raises(UserError, match="schema version 1, this version reads 2"):
        ExternalMemory.open(folder)


def test_a_file_is_checked_when_first_read_and_again_when_it_changed(folder: Path, monkeypatch):
    checked: list[str] = []
    digest = shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: checked.append(path.name) or digest(path))
    memory = ExternalMemory.open(folder)
    for _ in range(3):
        memory.load()
    names = [info.name for info in memory.manifest.shards]
    assert checked == names
    kept = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(kept[:-1] + b"?")
    for _ in range(2):
        with pytest.raises(UserError, match="shard-00001.parquet: damaged shard"):
            memory.load()
    (folder / names[1]).write_bytes(kept)
    assert len(memory.load()) == len(memory)
    assert checked == [*names, *[names[1]] * 3]


def test_missing_changed_and_swapped_shards_are_refused(folder: Path):
    memory = ExternalMemory.open(folder)
    first, second = folder / "shard-00000.parquet", folder / "shard-00001.parquet"
    kept = first.read_bytes()
    first.write_bytes(kept[:-1] + b"?")
    with pytest.raises(UserError, match="shard-00000.parquet: damaged shard"):
        memory.load()
    shutil.copy(second, first)
    with pytest.raises(UserError, match="shard-00000.parquet: damaged shard"):
        memory.load()
    with pytest.raises(UserError, match="the manifest says \\(4, 3\\)"):
        list(memory.shards(verify=False))
    first.unlink()
    with pytest.raises(UserError, match="shard-00000.parquet: this shard is missing"):
        memory.load()
