"""An opened memory is the one its manifest describes, for the PLM that built it, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory, Manifest, MemoryRows, ShardInfo, shards
from pema_ray.memory.codec import encode
from pema_ray.memory.shards import write_shard

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
    shards = []
    for number, start in enumerate(range(0, len(LENGTHS), PER_SHARD)):
        examples = list(range(start, min(start + PER_SHARD, len(LENGTHS))))
        name, rows = f"shard-{number:05d}.parquet", block(examples)
        size, digest = write_shard(tmp_path / name, rows)
        counts = {"rows": len(rows), "examples": len(examples), "tokens": 9, "padded_tokens": 9}
        shards.append(ShardInfo(name=name, bytes=size, sha256=digest, **counts))
    manifest = Manifest(
        plm_name=CARD.name, fingerprint=CARD.fingerprint, hidden_size=H, vocab_size=50, eos_token_id=1, task="t",
        split="train", context="teacher_forced", key_dtype="float32", plan_hash="0" * 16, rows=sum(LENGTHS),
        examples=len(LENGTHS), shards=tuple(shards),
    )  # fmt: skip
    manifest.save(tmp_path)
    return tmp_path


def test_all_rows_come_back_in_order(folder: Path):
    memory, whole = ExternalMemory.open(folder, CARD), block([0, 1, 2, 3, 4])
    assert len(memory) == 12
    assert np.array_equal(memory.load().key[:], whole.key[:])
    for field in ("target", "example_id", "position"):
        assert np.array_equal(getattr(memory.load(), field), getattr(whole, field))
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
    other = ModelCard("huge", "b" * 16, H, 50, 96, (1,))
    with pytest.raises(FingerprintMismatch) as caught:
        ExternalMemory.open(folder, other)
    assert "tiny (aaaaaaaaaaaaaaaa)" in str(caught.value) and "huge (bbbbbbbbbbbbbbbb)" in str(caught.value)
    assert ExternalMemory.open(folder, ModelCard("renamed", "a" * 16, H, 50, 96, (1,)))


def test_no_memory_is_told_apart_from_a_damaged_one(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no external memory here .*Run build-memory"):
        ExternalMemory.open(tmp_path / "nowhere")
    path = folder / "manifest.json"
    whole = path.read_text()
    described = json.loads(whole)
    del described["rows"]
    for damage in (whole[:100], "", "[]", json.dumps(described), '{"schema_version": "x"}'):
        path.write_text(damage)
        with pytest.raises(UserError, match="damaged manifest: .*Run build-memory again"):
            ExternalMemory.open(folder)
    path.write_text(json.dumps(json.loads(whole) | {"schema_version": 1}))
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
