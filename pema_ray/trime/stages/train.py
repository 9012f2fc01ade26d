"""Stage 3 of a TRIME run: train the language model by Ray Train."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.errors import UserError
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.training.ray_checkpoint import reporting_checkpoints
from pema_ray.training.ray_loop import reporting, run_workers, showing_loss, worker_place
from pema_ray.training.trainer import RESUMED_FROM, TrainerHistory
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.model.registry import count_parameters, make_model, save_model, shape_of
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.batches import read_walk
from pema_ray.trime.text.segments import Segments, TokenStream
from pema_ray.trime.training.trainer import TrimeTrainer

MODEL = "model"


@dataclass(frozen=True)
class TrimeTrainingJob:
    """Everything a worker needs; paths are absolute."""

    config: TrimeConfig
    prepared: Path
    walk: Path | None
    run_dir: Path
    vocabulary_size: int


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `train/model/`, `train/history.json` and the trackers' files."""
    run = TrimeRun(config)
    return run.perform("train", lambda: _train(run))


def _train(run: TrimeRun) -> dict[str, Any]:
    c = run.config
    shape_of(c.model)  # refused here rather than in a worker
    prepared = run.metrics("prepare")
    job = TrimeTrainingJob(
        c,
        run.path("prepare"),
        run.path("batches") if c.batches.order == "bm25" else None,
        run.path("train"),
        prepared["vocabulary"],
    )
    t = c.train
    cluster = ray_cluster(c.ray, t.cpus_per_worker, t.gpus_per_worker, t.min_workers or t.workers)
    with cluster, track("training", t.updates, "updates") as bar:
        told = run_workers(_work, job, job.run_dir, t, showing_loss(bar)).returned
    history = TrainerHistory.from_dict(told["history"])
    with atomic_file(run.path("train", "history.json")) as temporary:
        temporary.write_text(json.dumps(told["history"]) + "\n")
    best = history.best_loss
    rate = told["tokens"] / max(1e-9, history.seconds)
    return {
        "parameters": told["parameters"],
        "updates": len(history.train),
        "best_step": history.best_step,
        "dev_loss": best,
        "dev_perplexity": math.exp(best),
        "tokens": told["tokens"],
        "tokens_per_second": round(rate, 1),
        "training_seconds": round(history.seconds, 2),
        "peak_bytes": history.peak_bytes,
        "summary": f"{told['parameters']:,} parameters; dev perplexity {math.exp(best):.2f} at update "
        f"{history.best_step} of {t.updates:,}, {rate:,.0f} tokens/s",
    }


def _work(job: TrimeTrainingJob) -> dict[str, Any]:
    """What every worker does."""
    c = job.config
    place = worker_place(c.train)
    train, dev = (Segments(TokenStream.open(job.prepared, split), c.batches.segment) for split in ("train", "dev"))
    walk_S: np.ndarray | None = read_walk(job.walk, len(train)) if job.walk else None
    torch.manual_seed(c.seed)
    model = make_model(c.model, job.vocabulary_size, c.batches.segment)
    if len(train) < c.batches.group:
        raise UserError(
            f"batches.group ({c.batches.group}) is more than the training split's {len(train):,} segments of "
            f"{c.batches.segment} tokens. Take a smaller group or segment, or more text."
        )
    settings = {"memory": c.train.memory, **c.train.model_dump(mode="json"), "seed": c.seed}
    name = f"trime {c.train.memory} {c.model.name}"
    with (
        reporting(job.run_dir, place, c.train, name, settings) as on_point,
        reporting_checkpoints(job.run_dir, place, RESUMED_FROM) as on_saved,
    ):
        trainer = TrimeTrainer(c, model, train, dev, job.run_dir, place, on_point, walk_S, on_saved)
        history = trainer.run()
    if place.leads:
        save_model(model, job.run_dir / MODEL)
    return {"history": history.to_dict(), "tokens": trainer.tokens_trained, "parameters": count_parameters(model)}
