"""`pema-ray memory …` describes and verifies memories, and converts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.memory import ExternalMemory, MemoryRows
from pema_ray.memory.codec import encode
from pema_ray.memory.manifest import MANIFEST, Manifest
from pema_ray.memory.shards import write_shard

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A memory of one shard: five rows of 4 numbers."""
    memory = tmp_path / "memory"
    memory.mkdir()
    key, ids = encode(np.random.default_rng(0).normal(size=(5, 4)), "float32"), np.arange(5, dtype=np.int64)
    rows = MemoryRows(key, np.arange(5, dtype=np.int32), ids, np.zeros(5, np.int32))
    size, digest = write_shard(memory / "shard-00000.parquet", rows)
    shard = {"name": "shard-00000.parquet", "rows": 5, "examples": 5, "tokens": 5, "padded_tokens": 5, "bytes": size}
    manifest = Manifest.model_validate(
        {"plm_name": "tiny", "fingerprint": "a" * 16, "hidden_size": 4, "vocab_size": 9, "eos_token_id": 1, "task": "t",
         "split": "train", "context": "teacher_forced", "key_dtype": "float32", "plan_hash": "0" * 16, "rows": 5,
         "examples": 5, "shards": [shard | {"sha256": digest}]}
    )  # fmt: skip
    manifest.save(memory)
    return memory


def invoke(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, ["memory", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_memory_is_described_verified_converted_and_merged(folder: Path, tmp_path: Path):
    code, output = invoke("describe", folder)
    assert code == 0 and "tiny (aaaaaaaaaaaaaaaa)" in output and "5 of 4 float32" in output
    assert invoke("verify", folder)[0] == 0
    code, output = invoke("convert", folder, tmp_path / "small", "--key-dtype", "int8")
    assert code == 0 and "5 rows of 4 int8" in output
    assert ExternalMemory.open(tmp_path / "small").load().key.dtype == "int8"
    code, output = invoke("merge", tmp_path / "both", folder, folder)
    assert code == 2
    assert not (tmp_path / "both" / MANIFEST).exists()


def test_faults_are_reported_and_exit_with_2(folder: Path, tmp_path: Path):
    (folder / "shard-00000.parquet").write_bytes(b"PAR1")
    code, output = invoke("verify", folder)
    assert code == 2 and "damaged shard" in output.replace("\n", " ")
    assert invoke("describe", tmp_path / "nowhere")[0] == 2
    assert invoke("convert", folder, folder)[0] == 2
