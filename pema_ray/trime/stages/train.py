"""`pema-ray trime train`: train the language model by Ray Train."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.errors import UserError
from pema_ray.training.ray_loop import run_in_worker, worker_place
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.model.registry import make_model, save_model, shape_of
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.batches import read_walk
from pema_ray.trime.text.segments import Segments, TokenStream
from pema_ray.trime.training.ray_training import outcome, train_on_ray
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
    shape_of(c.model)  # rejects an unknown name here rather than in a worker
    prepared = run.metrics("prepare")
    job = TrimeTrainingJob(
        c,
        run.path("prepare"),
        run.path("batches") if c.batches.order == "bm25" else None,
        run.path("train"),
        prepared["vocabulary"],
    )
    return train_on_ray(_work, job, job.run_dir, c.train, c.ray, c.train.updates)


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
    trainer = TrimeTrainer(c, model, train, dev, job.run_dir, place=place, walk_S=walk_S)
    run_in_worker(trainer, name, settings)
    if not place.leads:
        return {}
    save_model(model, job.run_dir / MODEL)
    return outcome(trainer)
