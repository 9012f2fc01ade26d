"""`mt-train`: prepare the parallel text, order it by BM25, and train by Ray Train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.runtime.files import atomic_file
from pema_ray.training.ray_loop import run_in_worker, worker_place
from pema_ray.trime.training.ray_training import outcome, train_on_ray
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
    counts = prepare(c.data, c.model.name, c.seed, run.path("prepare"))
    train = counts["train"]
    summary = f"{train['pairs']:,} training pairs, {train['target_tokens']:,} target subwords"
    return {**counts, "summary": summary + f"; {train['left_out']:,} too long" * bool(train["left_out"])}


def _train(run: MtRun) -> dict[str, Any]:
    c, t = run.config, run.config.train
    prepared = run.metrics("prepare")
    if c.batches.order == "bm25" and not run.path("train", WALK).exists():
        pairs = Parallel.load(run.path("prepare"), "train")
        walk_S = bm25_walk(pairs, c.batches.neighbours, c.seed, run.path("train", "bm25"))
        with atomic_file(run.path("train", WALK)) as temporary, temporary.open("wb") as file:
            np.save(file, walk_S)
    job = MtTrainingJob(c, run.path("prepare"), run.path("train"), prepared["source_words"], prepared["target_words"])
    return train_on_ray(_work, job, job.run_dir, t, c.ray, make_trainer(job).steps, "target tokens")


def make_trainer(job: MtTrainingJob, **more: Any) -> MtTrainer:
    """The trainer of one worker."""
    c = job.config
    torch.manual_seed(c.seed)
    model = make_translator(c.model, job.source_words, job.target_words, c.data.max_tokens)
    train, dev = (Parallel.load(job.prepared, split) for split in ("train", "dev"))
    walk_S = np.load(job.run_dir / WALK) if c.batches.order == "bm25" else None
    eos = load_subwords(job.prepared, c.model.name).eos
    return MtTrainer(c, model, train, dev, job.run_dir, eos, walk_S=walk_S, **more)


def _work(job: MtTrainingJob) -> dict[str, Any]:
    """What every worker does."""
    c = job.config
    place = worker_place(c.train)
    settings = {**c.train.model_dump(mode="json"), "seed": c.seed}
    trainer = make_trainer(job, place=place)
    run_in_worker(trainer, f"trime mt {c.train.memory}", settings)
    if not place.leads:
        return {}
    save_translator(trainer.model, job.run_dir / MODEL)
    return outcome(trainer)
