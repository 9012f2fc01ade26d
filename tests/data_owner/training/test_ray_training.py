"""Training on Ray writes an adapter, its history and its curves, and raises the worker's own errors."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.train import Result

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.batch_samplers import StreamShuffle
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.ray_training import FIRST_STEP, AdapterTrainingJob, _train, fit
from pema_ray.data_owner.training.trainer import AdapterHistory, AdapterTrainer
from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle, ModelCard
from pema_ray.memory import ExternalMemory, Manifest, MemoryRows, ShardInfo
from pema_ray.memory.build import run_build, stream_shards
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.planning import planned_rows
from pema_ray.memory.shards import write_shard
from pema_ray.memory.specification import MemoryBuild
from pema_ray.tasks import EncodedPair
from pema_ray.training.ray_loop import _worker
from pema_ray.training.trainer import RESUMED_FROM
from tests.training_kit import train

OTHER = ModelCard("huge", "b" * 16, 32, 380, 96, (1,))
CONFIG = TrainConfig(
    rank=6, batch_size=64, epochs=2, validate_every=2, learning_rate=1e-2, dropout=0.0, cpus_per_worker=0.5,
    dtype="float32",
)  # fmt: skip


def write_memory(folder: Path, card: ModelCard, rows: MemoryRows, split: str) -> Path:
    folder.mkdir()
    shards = []
    for number, start in enumerate(range(0, len(rows), 100)):
        name, part = f"shard-{number:05d}.parquet", rows.take(slice(start, start + 100))
        size, digest = write_shard(folder / name, part)
        counts = {"rows": len(part), "examples": len(part), "tokens": len(part), "padded_tokens": len(part)}
        shards.append(ShardInfo(name=name, bytes=size, sha256=digest, **counts))
    manifest = Manifest(
        plm_name=card.name, fingerprint=card.fingerprint, hidden_size=card.hidden_size, vocab_size=card.vocab_size,
        eos_token_id=1, task="t", split=split, context="teacher_forced", key_dtype="float32", plan_hash="0" * 16,
        rows=len(rows), examples=len(rows), shards=tuple(shards),
    )  # fmt: skip
    manifest.save(folder)
    return folder


@pytest.fixture
def make_job(tiny_source, make_rows, tmp_path: Path) -> Callable[..., AdapterTrainingJob]:
    """Makes a job of 256 training and 100 dev rows for the tiny llama."""

    def make(owner: ModelCard | None = None, **changes) -> AdapterTrainingJob:
        bundle = tiny_source("llama").lm_head()
        card = bundle.card
        adapter = AdapterConfig(card.hidden_size, CONFIG.rank, card.name, card.fingerprint, dropout=CONFIG.dropout)
        job = AdapterTrainingJob(
            train_memory=write_memory(tmp_path / "train", owner or card, make_rows(256, 1, card.hidden_size), "train"),
            dev_memory=write_memory(tmp_path / "dev", owner or card, make_rows(100, 2, card.hidden_size), "dev"),
            bundle=bundle.save(tmp_path / "lm_head"),
            run_dir=tmp_path / "run",
            adapter=adapter,
            config=CONFIG,
        )
        return replace(job, **changes)

    return make


@pytest.mark.cluster
def test_two_workers_leave_the_adapter_of_one_its_history_and_its_curves(ray_cluster, make_job, tmp_path: Path):
    job, points = make_job(config=CONFIG.model_copy(update={"workers": 2})), []
    history = fit(job, lambda kind, point: points.append((kind, point)))
    assert history.total_steps == len(history.train) == 8
    assert history.best_loss < history.validation[0]["prediction"]
    assert [point for kind, point in points if kind == "train"] == history.train
    assert [point for kind, point in points if kind == "validation"] == history.validation
    assert AdapterHistory.from_dict(json.loads((job.run_dir / "history.json").read_text())) == history
    assert list((job.run_dir / "tensorboard").glob("events.out.tfevents.*"))
    reported = Result.from_path(str(job.run_dir / "ray_train"))
    best = {"best_step": history.best_step, "best_loss": history.best_loss}
    assert reported.metrics == history.validation[-1] | best
    assert reported.checkpoint is not None
    for name in RESUMED_FROM:
        assert (Path(reported.checkpoint.path) / name).read_bytes() == (job.run_dir / name).read_bytes()

    bundle = LMHeadBundle.load(job.bundle)
    adapter = PemaAdapter.from_pretrained(job.run_dir / "adapter", bundle.card)
    assert f"{history.best_loss:.3f} at step {history.best_step}" in (job.run_dir / "adapter/README.md").read_text()
    rows = (ExternalMemory.open(path).load() for path in (job.train_memory, job.dev_memory))
    local, local_history = train(AdapterTrainer(job.adapter, job.config, bundle.head, *rows, tmp_path / "here"))
    for parameter, expected in zip(adapter.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=1e-5)
    losses = [[point["prediction"] for point in run.validation] for run in (history, local_history)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def slow_factory(folder: str, seconds: float) -> Callable:
    """Makes the tiny PLM with a delay for every batch; a closure, so that it travels by value."""

    def make():
        import asyncio

        from pema_ray.line.plm_config import PLMConfig
        from pema_ray.plm_owner import LocalPLM

        class Slow(LocalPLM):
            async def extract(self, batch):
                await asyncio.sleep(seconds)
                return await super().extract(batch)

        return Slow(PLMConfig(name=folder, dtype="float32", device="cpu", threads=1))

    return make


@pytest.mark.slow
@pytest.mark.cluster
def test_training_begins_before_a_tenth_of_the_memory_is_built(
    ray_cluster, make_job, tiny_plm_folder, tiny_source, tmp_path: Path
):
    draw, card = np.random.default_rng(0), tiny_source("llama").describe().card
    examples = [EncodedPair(i, [5, 6, 7], draw.integers(3, 300, 12).tolist()) for i in range(60)]
    settings = BuildMemoryConfig(examples_per_shard=1, cpus_per_actor=0.5, requests_in_flight=1)
    build = MemoryBuild(tmp_path / "streamed", ListedExamples(examples), card, "t", "train", settings)
    config = CONFIG.model_copy(update={"batch_size": 20, "stream": True, "patience": 1000})
    job = make_job(config=config, train_memory=build.folder, streamed_rows=planned_rows(build))
    history = fit(job, stream=stream_shards(build, slow_factory(tiny_plm_folder("llama"), 1.0)))
    assert history.rows == planned_rows(build) == 60 * 13
    assert len(history.train) == history.total_steps == 2 * (780 // 20)
    assert 2 <= json.loads((job.run_dir / FIRST_STEP).read_text())["shards"] <= 6

    def refused():
        raise AssertionError("every shard is there: no PLM is needed")

    manifest = run_build(build, refused)
    assert (manifest.rows, len(manifest.shards)) == (780, 60)
    memory = ExternalMemory.open(build.folder, card)
    arrivals = lambda: (memory.read([number]) for number in range(60))  # noqa: E731
    sampler = StreamShuffle(780, 1.0, arrivals, memory.view, 20, job.seed)
    dev = ExternalMemory.open(job.dev_memory).view(max_rows=config.validation_rows)
    head = LMHeadBundle.load(job.bundle).head
    local, local_history = train(AdapterTrainer(job.adapter, config, head, sampler, dev, tmp_path / "here"))
    streamed = PemaAdapter.from_pretrained(job.run_dir / "adapter")
    for parameter, expected in zip(streamed.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-6)
    assert [p["step"] for p in history.train] == [p["step"] for p in local_history.train]


@pytest.mark.cluster
def test_a_memory_of_another_plm_is_refused_and_both_are_named(ray_cluster, make_job, tiny_source):
    job = make_job(owner=OTHER)
    with pytest.raises(UserError) as caught:
        fit(job)
    assert OTHER.label in str(caught.value) and tiny_source("llama").describe().card.label in str(caught.value)
    assert not (job.run_dir / "adapter").exists()


def work(job: AdapterTrainingJob) -> str:
    """The error message of a single worker."""
    return _worker({"work": _train, "settings": job, "run_dir": job.run_dir})["error"]


def test_a_damaged_shard_is_refused_by_name(make_job, monkeypatch):
    context = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    job = make_job()
    shard = job.train_memory / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "shard-00001.parquet: damaged shard" in work(job)
    shard.unlink()
    assert "shard-00001.parquet: this shard is missing" in work(job)


@pytest.mark.cluster
def test_one_worker_of_a_node_checks_the_files_for_all(ray_cluster, make_job):
    job = make_job(config=CONFIG.model_copy(update={"workers": 2}))
    shard = job.train_memory / "shard-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.parquet: damaged shard"):
        fit(job)
    assert not (job.run_dir / "adapter").exists()


def test_a_rank_above_the_hidden_size_is_refused_before_anything_starts(make_job):
    job = make_job()
    with pytest.raises(UserError, match="train.rank=33: the rank must lie between 1 and the PLM's hidden size 32"):
        replace(job.adapter, rank=33)
