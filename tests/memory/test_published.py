"""A published memory outlives its job, is read without copying, and comes back after a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory, MemoryRows
from pema_ray.memory.codec import encode
from pema_ray.memory.published import NAMESPACE, drop, list_published, publish, store_state
from tests.memory.kit import write_memory

CARD = ModelCard("tiny", "a" * 16, 8, 300, 96, (1,))
pytestmark = pytest.mark.cluster


def make_memory(folder: Path, shards: int = 5, rows: int = 40, hidden: int = 8, dtype="float32") -> ExternalMemory:
    random, blocks = np.random.default_rng(0), []
    for number in range(shards):
        ids = np.arange(number * rows, (number + 1) * rows)
        key = encode(random.normal(size=(rows, hidden)).astype(np.float32), dtype)
        target = random.integers(0, 300, rows, dtype=np.int32)
        blocks.append(MemoryRows(key, target, ids, np.zeros(rows, np.int32)))
    return write_memory(folder, blocks)


@pytest.fixture
def clean(ray_cluster):
    yield
    for entry in list_published():
        drop(entry.name)


def test_a_memory_that_is_dropped_while_others_are_listed_is_left_out(clean, tmp_path: Path, monkeypatch):
    make_memory(tmp_path / "m")
    publish(tmp_path / "m", "stays", holders=1)
    monkeypatch.setattr("pema_ray.memory.published._names", lambda: ["gone", "stays"])
    assert [entry.name for entry in list_published()] == ["stays"]


def test_an_interrupted_publication_or_drop_can_be_repeated(clean, tmp_path: Path):
    import ray

    make_memory(tmp_path / "m")
    publish(tmp_path / "m", "twice", holders=2)
    ray.kill(ray.get_actor("memory/twice", NAMESPACE))  # holders without a register
    while list_published():
        pass
    publish(tmp_path / "m", "twice", holders=3)
    (entry,) = list_published()
    assert (entry.name, entry.holders) == ("twice", 3)
    ray.kill(ray.get_actor("memory/twice", NAMESPACE))
    while list_published():
        pass
    drop("twice")
    with pytest.raises(UserError, match="there: none"):
        drop("twice")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_read_back_is_what_was_published_and_shares_its_memory(clean, tmp_path: Path, dtype: str):
    memory = make_memory(tmp_path / "m", dtype=dtype)
    publish(tmp_path / "m", "bible", holders=2)
    published = ExternalMemory.open("ray://bible", CARD)
    assert published.manifest == memory.manifest and len(published) == 200
    original, copy = memory.load(), published.load()
    np.testing.assert_array_equal(original.key[:], copy.key[:])
    np.testing.assert_array_equal(original.target, copy.target)
    first, again = (published.shard(published.manifest.shards[0]) for _ in range(2))
    assert np.shares_memory(first.key.data, again.key.data) and not first.key.data.flags.writeable
    (entry,) = list_published()
    assert (entry.name, entry.holders, entry.nodes, entry.folder) == ("bible", 2, 1, str(tmp_path / "m"))
    assert entry.nbytes == sum(part.nbytes for part in memory.shards())
    drop("bible")
    assert list_published() == []
    with pytest.raises(UserError, match="ray://bible: has been dropped. Publish it again."):
        published.shard(published.manifest.shards[0])
    with pytest.raises(
        UserError, match="ray://bible: no memory of that name is published on this cluster .*there: none"
    ):
        ExternalMemory.open("ray://bible")


def test_names_owners_and_damage_are_refused(clean, tmp_path: Path):
    make_memory(tmp_path / "m")
    publish(tmp_path / "m", "one")
    with pytest.raises(UserError, match="ray://one: is published already"):
        publish(tmp_path / "m", "one")
    with pytest.raises(UserError, match="cannot name a published memory"):
        publish(tmp_path / "m", "a/b")
    with pytest.raises(FingerprintMismatch, match="huge"):
        ExternalMemory.open("ray://one", ModelCard("huge", "b" * 16, 8, 300, 96, (1,)))
    make_memory(tmp_path / "broken")
    shard = tmp_path / "broken" / "shard-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="shard-00003.parquet: damaged shard"):
        publish(tmp_path / "broken", "broken")
    assert [entry.name for entry in list_published()] == ["one"]
    with pytest.raises(UserError, match="there: one"):
        drop("broken")


def test_a_holder_that_is_killed_reads_its_shards_again(clean, tmp_path: Path):
    import ray

    memory = make_memory(tmp_path / "m")
    published = publish(tmp_path / "m", "mortal", holders=2)
    rows = published.shard(published.manifest.shards[0])
    pid = ray.get(ray.get_actor("holder/mortal/0", NAMESPACE).__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    np.testing.assert_array_equal(published.load().target, memory.load().target)
    np.testing.assert_array_equal(rows.key[:], memory.shard(memory.manifest.shards[0]).key[:])
    (entry,) = list_published()
    assert (entry.holders, entry.missing) == (2, 0)
    again = ray.get(ray.get_actor("holder/mortal/0", NAMESPACE).__ray_call__.remote(lambda self: os.getpid()))
    assert again != pid


def test_a_memory_larger_than_the_store_is_warned_of_and_spills(clean, tmp_path: Path):
    """The tests' store has 100 MiB."""
    memory, warnings = make_memory(tmp_path / "m", shards=6, rows=10_000, hidden=600), []
    before = store_state()
    published = publish(tmp_path / "m", "large", warn=warnings.append)
    (warning,) = warnings
    assert "the object stores have" in warning and "train.shuffle=window" in warning
    for info in published.manifest.shards:
        np.testing.assert_array_equal(published.shard(info).target, memory.shard(info).target)
    assert store_state().spilled > before.spilled


def test_a_published_memory_outlives_the_job_that_published_it(tmp_path: Path):
    """Two processes, one after the other, on a cluster of their own."""
    make_memory(tmp_path / "m")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    cluster = (
        "import ray, time\nfrom ray.cluster_utils import Cluster\n"
        "c = Cluster(initialize_head=True, head_node_args={'num_cpus': 2, 'object_store_memory': 90 * 2**20})\n"
        "print(c.address, flush=True)\ntime.sleep(600)\n"
    )
    head = subprocess.Popen([sys.executable, "-c", cluster], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()

        def command(*words: str) -> str:
            program = [
                sys.executable,
                "-c",
                "from pema_ray.commands.main import main; main()",
                "memory",
                *words,
                "--address",
                address,
            ]
            done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return " ".join(done.stdout.split())

        assert "ray://kept: 200 rows" in command("publish", str(tmp_path / "m"), "kept")
        listed = command("list")
        assert "kept 200" in listed and "MiB spilled so far" in listed
        assert "ray://kept is dropped" in command("drop", "kept")
        assert "kept" not in command("list")
    finally:
        head.send_signal(signal.SIGINT)
        try:
            head.wait(timeout=30)
        finally:
            head.kill()
