"""`pema-ray train`: train the adapter on the memory, by Ray Train."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.ray_training import FIRST_STEP, AdapterTrainingJob, fit
from pema_ray.data_owner.training.trainer import AdapterHistory
from pema_ray.errors import UserError
from pema_ray.experiment.stage_run import claim
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import run_build, run_builds, stream_shards
from pema_ray.memory.planning import find_or_make_plan, finished_shards, planned_mean_weight, planned_rows
from pema_ray.memory.published import SCHEME, open_published
from pema_ray.memory.waits import showing
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.run import Run
from pema_ray.pema.stages.build_memory import actor_settings, measure_memory, plan_memories, plm_client, showing_waits
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.progress import track
from pema_ray.training.ray_loop import showing_loss


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `train/adapter/`, `train/history.json` and the trackers' files."""
    run = Run(config)
    if config.train.stream and not run.finished("build_memory"):
        return _while_building(run)
    return run.perform("train", lambda: _measure(_train(run), config.train.batch_size))


def _train(run: Run) -> AdapterHistory:
    """Train on the finished memory."""
    c, card = run.config.train, run.bundle.card
    job = training_job(run)
    train_memory = ExternalMemory.open(job.train_memory, card)
    ExternalMemory.open(job.dev_memory, card)
    if c.shuffle == "window" and c.max_train_pairs:
        raise UserError("train.max_train_pairs needs train.shuffle=global: windows are made of whole shards.")
    share = min(1.0, (c.max_train_pairs or train_memory.manifest.examples) / train_memory.manifest.examples)
    rows = max(1, int(share * len(train_memory)))  # an estimate: the excluded pairs may be longer or shorter
    workers, placement = c.min_workers or c.workers, run.config.placement
    cluster = ray_cluster(run.config.ray, c.cpus_per_worker, c.gpus_per_worker, workers, placement=placement)
    with cluster, track("training", _steps(c, rows)) as bar:
        if c.published:
            job = replace(job, train_memory=_published(c.published, train_memory))
        run.claim("train")
        return fit(job, showing_loss(bar, c.batch_size, "prediction"))


def _while_building(run: Run) -> dict[str, Any]:
    """Both stages at once: the dev memory is built first, then train reads each train shard as it is built."""
    c, settings = run.config.train, actor_settings(run.config)
    if settings.context != "teacher_forced":
        raise UserError("train.stream needs build_memory.context=teacher_forced: other contexts cannot be planned.")
    if {"train", "dev"} - set(settings.splits):
        raise UserError(f"train.stream needs train and dev in build_memory.splits, which is {list(settings.splits)}.")
    trained: list[AdapterHistory] = []

    def work() -> dict[str, Any]:
        builds = plan_memories(run)
        client = plm_client(run)
        train_folder = builds["train"].folder
        # Actors and the worker run at the same time, beside the one CPU that Ray Data reads with.
        cpus = settings.actors * settings.cpus_per_actor + c.cpus_per_worker
        gpus = settings.actors * settings.gpus_per_actor + c.gpus_per_worker
        with ray_cluster(run.config.ray, cpus, gpus, readers=1, placement=run.config.placement):
            for build in builds.values():
                find_or_make_plan(build)
            rows, finished = planned_rows(builds["train"]), len(finished_shards(train_folder))
            manifests = run_builds([build for split, build in builds.items() if split != "train"], client)
            started = time.time()
            weight = planned_mean_weight(builds["train"])
            job = replace(training_job(run), streamed_rows=rows, streamed_mean_weight=weight)
            claim(job.run_dir, run.stamp("train"))
            with track("building and training", _steps(c, rows)) as bar, showing(showing_waits(bar)) as board:
                stream = stream_shards(builds["train"], client, board)
                trained.append(fit(job, showing_loss(bar, c.batch_size, "prediction"), stream))
            manifests.append(run_build(builds["train"], client))  # the shards that an early stop has left
        built_at = max((train_folder / shard.name).stat().st_mtime for shard in manifests[-1].shards)
        metrics = measure_memory(manifests, manifests[-1].rows if not finished else 0, max(1e-3, built_at - started))
        record = run.path("train", FIRST_STEP)  # lost if the worker died just after its first step
        shards = json.loads(record.read_text())["shards"] if record.exists() else None
        return metrics | {"shards_at_first_step": shards, "train_shards": len(manifests[-1].shards)}

    run.perform("build_memory", work)
    # Nothing is trained if another process has finished the memory meanwhile.
    return run.perform("train", lambda: _measure(trained[0] if trained else _train(run), c.batch_size))


def training_job(run: Run, c: TrainConfig | None = None) -> AdapterTrainingJob:
    """Training with the run's settings, or with others (`c`)."""
    c, card, prefix = c or run.config.train, run.bundle.card, run.config.plm.prefix
    adapter = AdapterConfig(
        hidden_size=card.hidden_size,
        rank=c.rank,
        plm_name=card.name,
        fingerprint=card.fingerprint,
        space=c.space,
        residual=c.residual,
        scale=1 / c.rank if c.scale_by_rank else 1.0,
        dropout=c.dropout,
        kappa=c.kappa,
        task=run.task.name,
        look_back_layers=c.look_back,
        look_back_width=c.look_back_width,
        look_back_dropout=c.look_back_dropout,
        local_memory_width=c.local_memory,
        predicts_lambda=c.predict_lambda,
        prompt_from=run.prompter().shared_tokens if c.reads_sequences else 0,
    )
    return AdapterTrainingJob(
        train_memory=run.path("build_memory", "train").resolve(),
        dev_memory=run.path("build_memory", "dev").resolve(),
        bundle=run.path("export_head", "lm_head").resolve(),
        run_dir=run.path("train").resolve(),
        adapter=adapter,
        config=c,
        seed=run.config.seed,
        placement=run.config.placement,
        prefix=None if prefix is None else Path(prefix).expanduser().absolute(),
    )


def _steps(c: TrainConfig, rows: int) -> int:
    return max(1, rows // min(c.batch_size, rows)) * c.epochs


def _published(name: str, memory: ExternalMemory) -> str:
    """The address of the published copy of this run's memory."""
    published = open_published(name)
    if published.manifest != memory.manifest:
        raise UserError(
            f"train.published={name}: published from {published.folder} (plan {published.manifest.plan_hash}), "
            f"not from this run's {memory.folder} (plan {memory.manifest.plan_hash}). Publish this run's memory."
        )
    return SCHEME + name


def _measure(history: AdapterHistory, batch_size: int) -> dict[str, Any]:
    first = history.validation[0]["prediction"]
    rate = min(batch_size, history.rows) * len(history.train) / max(1e-9, history.seconds)
    return {
        "rows": history.rows,
        "steps": len(history.train),
        "best_step": history.best_step,
        "dev_prediction_before": first,
        "dev_prediction": history.best_loss,
        "reconstruction_error": history.reconstruction_error,
        "reconstruction_seconds": round(history.reconstruction_seconds, 2),
        "rows_per_second": round(rate, 1),
        "stopped_early": history.stopped_early,
        "summary": f"dev loss {first:.3f} → {history.best_loss:.3f} nats at step {history.best_step} of "
        f"{len(history.train)}, {rate:,.0f} rows/s, stage 1 in {history.reconstruction_seconds:.1f} s",
    }
