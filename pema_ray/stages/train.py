"""Stage 4 of a run, the data owner's: train the adapter on the memory, by Ray Train."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from pema_ray.config import ExperimentConfig
from pema_ray.data_owner.adapter import AdapterConfig
from pema_ray.data_owner.ray_training import TrainingJob, fit
from pema_ray.data_owner.training import History, Point
from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory
from pema_ray.memory.published import SCHEME, open_published
from pema_ray.stages.cluster import ray_cluster
from pema_ray.stages.progress import track
from pema_ray.stages.run import Run


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `train/adapter/`, `train/history.json` and TensorBoard files."""
    run = Run(config)

    def work() -> dict[str, Any]:
        c, card = config.train, run.bundle.card
        adapter = AdapterConfig(
            hidden_size=card.hidden_size,
            rank=c.rank,
            plm_name=card.name,
            fingerprint=card.fingerprint,
            space=c.space,
            residual=c.residual,
            dropout=c.dropout,
            kappa=c.kappa,
            task=run.task.name,
        )
        folder = run.path("train")
        job = TrainingJob(
            train_memory=run.path("build_memory", "train").resolve(),
            dev_memory=run.path("build_memory", "dev").resolve(),
            bundle=run.path("export_head", "lm_head").resolve(),
            run_dir=folder.resolve(),
            adapter=adapter,
            config=c,
            seed=config.seed,
        )
        train_memory = ExternalMemory.open(job.train_memory, card)
        ExternalMemory.open(job.dev_memory, card)
        if c.shuffle == "window" and c.max_train_pairs:
            raise UserError("train.max_train_pairs needs train.shuffle=global: windows are made of whole shards.")
        share = min(1.0, (c.max_train_pairs or train_memory.manifest.examples) / train_memory.manifest.examples)
        rows = max(1, int(share * len(train_memory)))  # exact but for the length of the pairs that are left out
        steps = max(1, rows // min(c.batch_size, rows)) * c.epochs
        cluster = ray_cluster(config.ray, c.cpus_per_worker, c.gpus_per_worker, c.workers)
        with cluster, track("training", steps) as bar:
            if c.published:
                job = replace(job, train_memory=_published(c.published, train_memory))
            _forget_other_settings(folder, run.stamp("train"))  # once nothing is left to be refused for

            def show(kind: str, point: Point) -> None:
                if kind == "train":
                    bar.advance(point.step - bar.done, c.batch_size, f"loss {point.prediction:.3f}")

            history = fit(job, show)
        return _measure(history, c.batch_size)

    return run.perform("train", work)


def _published(name: str, memory: ExternalMemory) -> str:
    """Where workers find the published copy of this run's memory."""
    found = open_published(name)
    if found.manifest != memory.manifest:
        raise UserError(
            f"train.published={name}: is not this run's memory {memory.folder}, but one of {found.folder} "
            f"(plans {found.manifest.plan_hash} and {memory.manifest.plan_hash}). Publish this run's."
        )
    return SCHEME + name


def _forget_other_settings(folder: Path, stamp: str) -> None:
    """A checkpoint is resumed only by a run with the very settings that wrote it."""
    marker = folder / "stamp"
    if not marker.exists() or marker.read_text() != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marker.write_text(stamp)


def _measure(history: History, batch_size: int) -> dict[str, Any]:
    first = history.validation[0].prediction
    rate = min(batch_size, history.rows) * len(history.train) / max(1e-9, history.seconds)
    return {
        "rows": history.rows,
        "steps": len(history.train),
        "best_step": history.best_step,
        "dev_prediction_before": first,
        "dev_prediction": history.best_prediction,
        "reconstruction_error": history.reconstruction_error,
        "reconstruction_seconds": round(history.reconstruction_seconds, 2),
        "rows_per_second": round(rate, 1),
        "stopped_early": history.stopped_early,
        "summary": f"dev loss {first:.3f} → {history.best_prediction:.3f} nats at step {history.best_step} of "
        f"{len(history.train)}, {rate:,.0f} rows/s, stage 1 in {history.reconstruction_seconds:.1f} s",
    }
