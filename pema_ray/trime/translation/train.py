"""`mt-train`: prepare the parallel text, order it by BM25, and train by Ray Train."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.training.ray_checkpoint import reporting_checkpoints
from pema_ray.training.ray_loop import reporting, run_workers, showing_loss, worker_place
from pema_ray.training.trainer import RESUMED_FROM, TrainerHistory
from pema_ray.trime.model.registry import count_parameters
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.data import Parallel, load_subwords, prepare
from pema_ray.trime.translation.groups import bm25_walk
from pema_ray.trime.translation.model import make_translator, save_translator
from pema_ray.trime.translation.run import MtRun
from pema_ray.trime.translation.trainer import MtTrainer

MODEL, WALK = "model", "walk.npy"


@dataclass(frozen=True)
class MtTrainingJob:
    """Everything a worker needs; paths are absolute."""

    config: MtConfig
    prepared: Path
    run_dir: Path
    source_words: int
    target_words: int


def run(config: MtConfig) -> dict[str, Any]:
    """Write `prepare/` and `train/`."""
    run = MtRun(config)
    run.perform("prepare", lambda: _prepare(run))
    return run.perform("train", lambda: _train(run))


def _prepare(run: MtRun) -> dict[str, Any]:
    c = run.config
    told = prepare(c.data, c.model.name, c.seed, run.path("prepare"))
    train = told["train"]
    summary = f"{train['pairs']:,} training pairs, {train['target_tokens']:,} target subwords"
    return {
        **told,
        "files": run.files,
        "summary": summary + f"; {train['left_out']:,} too long" * bool(train["left_out"]),
    }


def _train(run: MtRun) -> dict[str, Any]:
    c, t = run.config, run.config.train
    prepared = run.metrics("prepare")
    if c.batches.order == "bm25" and not run.path("train", WALK).exists():
        pairs = Parallel.load(run.path("prepare"), "train")
        walk_S = bm25_walk(pairs, c.batches.neighbours, c.seed, run.path("train", "bm25"))
        with atomic_file(run.path("train", WALK)) as temporary, temporary.open("wb") as file:
            np.save(file, walk_S)
    job = MtTrainingJob(c, run.path("prepare"), run.path("train"), prepared["source_words"], prepared["target_words"])
    cluster = ray_cluster(c.ray, t.cpus_per_worker, t.gpus_per_worker, t.min_workers or t.workers)
    total = make_trainer(job).steps
    with cluster, track("training", total, "updates") as bar:
        told = run_workers(_work, job, job.run_dir, t, showing_loss(bar)).returned
    history = TrainerHistory.from_dict(told["history"])
    with atomic_file(run.path("train", "history.json")) as temporary:
        temporary.write_text(json.dumps(told["history"]) + "\n")
    rate = told["tokens"] / max(1e-9, history.seconds)
    return {
        "parameters": told["parameters"],
        "updates": total,
        "best_step": history.best_step,
        "dev_loss": history.best_loss,
        "tokens": told["tokens"],
        "training_seconds": round(history.seconds, 2),
        "peak_bytes": history.peak_bytes,
        "summary": f"{told['parameters']:,} parameters; dev perplexity {math.exp(history.best_loss):.2f} at update "
        f"{history.best_step} of {total:,}, {rate:,.0f} target tokens/s",
    }


def make_trainer(job: MtTrainingJob, **more: Any) -> MtTrainer:
    """The loop of one worker."""
    c = job.config
    torch.manual_seed(c.seed)
    model = make_translator(c.model, job.source_words, job.target_words, c.data.max_tokens)
    train, dev = (Parallel.load(job.prepared, split) for split in ("train", "dev"))
    walk_S = np.load(job.run_dir / WALK) if c.batches.order == "bm25" else None
    eos = load_subwords(job.prepared, c.model.name).eos
    return MtTrainer(c, model, eos, train, dev, job.run_dir, walk_S=walk_S, **more)


def _work(job: MtTrainingJob) -> dict[str, Any]:
    """What every worker does."""
    c = job.config
    place = worker_place(c.train)
    settings = {**c.train.model_dump(mode="json"), "seed": c.seed}
    with (
        reporting(job.run_dir, place, c.train, f"trime mt {c.train.memory}", settings) as on_point,
        reporting_checkpoints(job.run_dir, place, RESUMED_FROM) as on_saved,
    ):
        trainer = make_trainer(job, place=place, on_point=on_point, on_saved=on_saved)
        history = trainer.run()
    if place.leads:
        save_translator(trainer.model, job.run_dir / MODEL)
    parameters = count_parameters(trainer.model)
    return {"history": history.to_dict(), "tokens": trainer.tokens_trained, "parameters": parameters}
