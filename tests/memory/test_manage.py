"""Converted, merged and imported memories hold the same rows; an impossible request leaves no memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory, MemoryRows
from pema_ray.memory.codec import KEY_DTYPES, KeyDtype, encode
from pema_ray.memory.manage import convert, import_memmaps, merge, verify
from pema_ray.memory.manifest import MANIFEST, Manifest
from pema_ray.memory.shards import write_shard
from tests.memory.kit import write_memory

H, V = 6, 50
CARD = ModelCard("tiny", "a" * 16, H, V, 96, (1,))


def make(folder: Path, examples: range, fingerprint: str = "a" * 16, seed: int = 0, prompt: int = 0, **changes) -> Path:
    """A memory of three rows an example, the first `prompt` of them its prompt's; four examples a shard."""
    random, blocks = np.random.default_rng(seed), []
    for start in range(examples.start, examples.stop, 4):
        ids = np.repeat(np.arange(start, min(start + 4, examples.stop)), 3)
        position = np.tile(np.arange(-prompt, 3 - prompt, dtype=np.int32), len(ids) // 3)
        key = encode(random.normal(size=(len(ids), H)).astype(np.float32), "float32")
        target = random.integers(0, V, len(ids), dtype=np.int32)
        blocks.append(MemoryRows(key, target, ids.astype(np.int64), position))
    fields = {"vocab_size": V, "fingerprint": fingerprint, "prompt_from": 1 if prompt else None, **changes}
    return write_memory(folder, blocks, **fields).folder


def rows_of(folder: Path) -> MemoryRows:
    return ExternalMemory.open(folder, CARD).load()


def same(a: MemoryRows, b: MemoryRows) -> bool:
    plain = all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("target", "example_id", "position"))
    return plain and np.array_equal(a.key[:], b.key[:])


def test_a_sound_memory_has_no_faults(tmp_path: Path):
    assert verify(make(tmp_path / "m", range(10))) == []


def test_every_fault_is_found_and_named(tmp_path: Path):
    folder = make(tmp_path / "m", range(14))
    shards = sorted(folder.glob("*.parquet"))
    content = bytearray(shards[0].read_bytes())
    content[len(content) // 2] ^= 1
    shards[0].write_bytes(content)
    shards[1].unlink()
    shards[2].write_bytes(shards[3].read_bytes())
    problems = verify(folder)
    assert len(problems) == 3
    messages = ("00000.parquet: damaged", "00001.parquet: this shard is", "00002.parquet: damaged")
    for problem, message in zip(problems, messages):
        assert message in problem


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"key_dtype": "float16"}, "keys are float32, the manifest says float16"),
        ({"vocab_size": 10}, "a target lies outside the vocabulary of 10"),
        ({"hidden_size": 5}, "holds rows (12, 6), the manifest says (12, 5)"),
        ({"rows": 30}, "30 rows in all, but its shards have 24"),
    ],
)
def test_a_manifest_that_does_not_describe_its_rows_is_found(changes: dict, fault: str, tmp_path: Path):
    assert any(fault in problem for problem in verify(make(tmp_path / "m", range(8), **changes)))


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_a_converted_memory_has_the_same_rows_in_its_format(dtype: KeyDtype, tmp_path: Path):
    source = make(tmp_path / "m", range(10))
    manifest = convert(source, tmp_path / "c", dtype)
    before, after = rows_of(source), rows_of(tmp_path / "c")
    assert manifest == Manifest.read(tmp_path / "c") and manifest.key_dtype == after.key.dtype == dtype
    assert np.array_equal(after.key[:], encode(before.key[:], dtype)[:])
    assert np.array_equal(after.target, before.target) and np.array_equal(after.example_id, before.example_id)
    assert verify(tmp_path / "c") == []
    assert manifest.plan_hash != Manifest.read(source).plan_hash


def test_merged_memories_are_one_after_the_other(tmp_path: Path):
    one, two = make(tmp_path / "a", range(6)), make(tmp_path / "b", range(6, 11), seed=1)
    manifest = merge([one, two], tmp_path / "m")
    assert (manifest.rows, manifest.examples, len(manifest.shards)) == (33, 11, 4)
    assert same(rows_of(tmp_path / "m"), MemoryRows.concatenate([rows_of(one), rows_of(two)]))
    assert verify(tmp_path / "m") == []


def test_what_does_not_belong_together_is_not_merged(tmp_path: Path):
    one = make(tmp_path / "a", range(6))
    with pytest.raises(FingerprintMismatch, match="tiny \\(bbbb.*tiny \\(aaaa"):
        merge([one, make(tmp_path / "b", range(6, 9), fingerprint="b" * 16)], tmp_path / "m")
    convert(make(tmp_path / "c", range(6, 9)), tmp_path / "half", "float16")
    with pytest.raises(UserError, match="key_dtype is float16, that of .* is float32. Convert one"):
        merge([one, tmp_path / "half"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="Example 5 is in .*a and in .*d: merge takes it once"):
        merge([one, make(tmp_path / "d", range(5, 7))], tmp_path / "m")
    with pytest.raises(UserError, match="no external memory here"):
        ExternalMemory.open(tmp_path / "m")
    with pytest.raises(UserError, match="two memories or more"):
        merge([one], tmp_path / "n")


def test_no_folder_that_holds_something_is_written_to(tmp_path: Path):
    source = make(tmp_path / "m", range(4))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(source, source, "int8")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    with pytest.raises(UserError, match="no external memory here"):
        convert(tmp_path / "gone", tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


# ── the published code's arrays ─────────────────────────────────────────────


def write_memmaps(folder: Path, keys: np.ndarray, ids: np.ndarray) -> tuple[Path, Path]:
    """In the published code's format: raw numbers under a `.npy` name, no header."""
    for name, array in (("dstore_keys.npy", keys), ("dstore_vals.npy", ids)):
        memmap = np.memmap(folder / name, array.dtype, "w+", shape=array.shape)
        memmap[:] = array
        memmap.flush()
    return folder / "dstore_keys.npy", folder / "dstore_vals.npy"


@pytest.mark.parametrize("named", [False, True], ids=["by size", "named"])
@pytest.mark.parametrize("ids_dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize("keys_dtype", ["float16", "float32"])
def test_published_arrays_are_imported_row_by_row(keys_dtype: str, ids_dtype: str, named: bool, tmp_path: Path):
    random = np.random.default_rng(0)
    keys, ids = random.normal(size=(70_000, H)).astype(keys_dtype), random.integers(0, V, (70_000, 1)).astype(ids_dtype)
    paths = write_memmaps(tmp_path, keys, ids)
    dtypes = (keys_dtype, ids_dtype) if named else ()
    manifest = import_memmaps(*paths, 70_000, CARD, tmp_path / "m", *dtypes)
    assert (manifest.rows, len(manifest.shards), manifest.fingerprint) == (70_000, 2, CARD.fingerprint)
    rows = rows_of(tmp_path / "m")
    assert np.array_equal(rows.key[:], keys.astype(np.float32)) and np.array_equal(rows.target, ids[:, 0])
    assert verify(tmp_path / "m") == []


def test_arrays_of_another_size_dtype_or_vocabulary_are_refused(tmp_path: Path):
    ids = np.full((8, 1), 7, np.int16)
    ids[5] = -3  # a large id that overflowed
    keys, targets = write_memmaps(tmp_path, np.zeros((8, H), np.float16), ids)
    with pytest.raises(
        UserError, match="dstore_keys.npy: 9 × 6 numbers take 108 bytes as float16 or 216 bytes as float32, it has 96"
    ):
        import_memmaps(keys, targets, 9, CARD, tmp_path / "m")
    with pytest.raises(UserError, match="dstore_vals.npy: 8 × 1 numbers take 32 bytes as int32, it has 16"):
        import_memmaps(keys, targets, 8, CARD, tmp_path / "m", "float16", "int32")
    with pytest.raises(UserError, match="'float61' is no number format"):
        import_memmaps(keys, targets, 8, CARD, tmp_path / "m", "float61")
    with pytest.raises(UserError, match="no such file"):
        import_memmaps(tmp_path / "gone", targets, 8, CARD, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match=r"row 5 holds -3, no token of tiny \(0 to 49\). Is int16 its dtype\?"):
        import_memmaps(keys, targets, 8, CARD, tmp_path / "m", "float16", "int16")
    assert not (tmp_path / "m" / MANIFEST).exists()


def test_merging_a_weighted_memory_with_a_plain_one_gives_every_row_a_weight(tmp_path: Path):
    plain, weighted = make(tmp_path / "plain", range(10)), make(tmp_path / "weighted", range(20, 30))
    memory = ExternalMemory.open(weighted)
    infos = []
    for info in memory.manifest.shards:  # weights of one throughout: as many rows as there are
        rows = memory.shard(info)
        size, digest = write_shard(weighted / info.name, replace(rows, weight=np.ones(len(rows), np.int32)))
        infos.append(info.model_copy(update={"bytes": size, "sha256": digest, "represents": len(rows)}))
    memory.manifest.model_copy(update={"shards": tuple(infos)}).save(weighted)
    merge([plain, weighted], tmp_path / "merged")
    merged = ExternalMemory.open(tmp_path / "merged")
    assert verify(tmp_path / "merged") == []
    assert merged.load().weight.tolist() == merged.view().weight.tolist() == [1] * len(merged)


def test_blocks_of_which_some_have_weights_count_the_others_once(tmp_path: Path):
    rows = rows_of(make(tmp_path / "m", range(10)))
    weighted = replace(rows, weight=np.full(len(rows), 3, np.int32))
    assert MemoryRows.concatenate([rows, weighted]).weight.tolist() == [1] * len(rows) + [3] * len(rows)


def test_rows_of_prompts_are_kept(tmp_path: Path):
    one, two = make(tmp_path / "one", range(8), prompt=2), make(tmp_path / "two", range(8, 12), prompt=2)
    assert verify(one) == []
    converted = convert(one, tmp_path / "converted", "float16")
    merged = merge([one, two], tmp_path / "merged")
    for manifest, folder, examples in ((converted, "converted", 8), (merged, "merged", 12)):
        assert verify(tmp_path / folder) == []
        assert (manifest.rows, manifest.prompt_from) == (examples, 1)
        assert sum(len(rows) for rows in ExternalMemory.open(tmp_path / folder).shards(prompts=True)) == 3 * examples
    with pytest.raises(UserError, match="prompt_from is None"):
        merge([one, make(tmp_path / "plain", range(20, 24))], tmp_path / "no")
