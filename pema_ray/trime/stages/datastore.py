"""`pema-ray trime datastore`: the keys of every training position, by model actors on Ray Data."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema_ray.line import ExtractBatch, ModelCard
from pema_ray.memory.build import run_build
from pema_ray.memory.planning import prepare_folder
from pema_ray.memory.specification import MemoryBuild
from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.runtime.progress import track
from pema_ray.trime.config import DatastoreConfig, TrimeConfig
from pema_ray.trime.datastore import KeyMaker, KeySource, LoadKeys, plan_datastore
from pema_ray.trime.evaluation.systems import window_of
from pema_ray.trime.model.registry import TrainableLM, load_model, read_fingerprint
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.text.segments import TokenStream


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `datastore/`: an external memory (`pema-ray memory describe` reads it)."""
    run = TrimeRun(config)
    return run.perform("datastore", lambda: _build(run))


def _build(run: TrimeRun) -> dict[str, Any]:
    c = run.config
    metrics, rate = build_on_ray(plan_build(run), key_maker, run.model_folder, c.datastore, c.ray)
    return {**metrics, "rows_per_second": round(rate, 1)}


def build_on_ray(
    build: MemoryBuild,
    make: KeyMaker,
    model_folder: Path,
    config: DatastoreConfig,
    ray: RayConfig,
) -> tuple[dict[str, Any], float]:
    """Make the missing shards of a datastore by model actors.

    Returns:
        (metrics of the stage, rows a second).
    """
    c, missing, started = config, len(prepare_folder(build)[0]), time.perf_counter()
    factory = LoadKeys(make, model_folder, max(1, int(c.cpus_per_actor)))
    cluster = ray_cluster(ray, c.cpus_per_actor, c.gpus_per_actor, readers=1) if missing else nullcontext()
    with cluster, track("datastore", missing, "shards") as bar:
        manifest = run_build(build, factory, lambda info: bar.advance(1, info.rows))
    size = sum(shard.bytes for shard in manifest.shards)
    rate = bar.rows / (time.perf_counter() - started)
    metrics = {
        "rows": manifest.rows,
        "hidden_size": manifest.hidden_size,
        "bytes": size,
        "summary": f"{manifest.rows:,} keys of {manifest.hidden_size} {manifest.key_dtype}, {size / 2**20:,.1f} MiB, "
        f"{rate:,.0f} rows/s",
    }
    return metrics, rate


def plan_build(run: TrimeRun, split: str = "train") -> MemoryBuild:
    """The datastore of a split."""
    stream = TokenStream.open(run.path("prepare"), split)
    length, context = window_of(run.config)
    card = card_of(run.model_folder, stream.eos_id)
    folder = run.path("datastore")
    return plan_datastore(folder, with_eos(stream), card, run.folder.name, split, run.config.datastore, length, context)


def with_eos(stream: TokenStream) -> np.ndarray:
    """The tokens of a split after an `<eos>`, from which the first one is predicted."""
    return np.concatenate([[stream.eos_id], stream.token_T]).astype(np.int64)


def card_of(folder: Path, eos_id: int, model: TrainableLM | None = None) -> ModelCard:
    """The card of a TRIME model in a datastore; the run folder's name is its name."""
    model = model or load_model(folder)
    name = folder.parent.parent.name if folder.name == "model" else folder.name
    sizes = (model.hidden_size, model.vocabulary_size, model.max_positions)
    return ModelCard(name, read_fingerprint(folder), *sizes, (eos_id,))


def key_maker(folder: Path, device: torch.device) -> Callable[[ExtractBatch], Tensor]:
    """The keys of the model in a folder."""
    return KeySource(load_model(folder).to(device), device).extract
