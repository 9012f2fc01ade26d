"""`pema-ray trime datastore`: the keys of every training position, by model actors on Ray Data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.line import ModelCard
from pema_ray.memory.build import run_build
from pema_ray.memory.planning import prepare_folder
from pema_ray.memory.specification import MemoryBuild
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.progress import track
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.datastore import KeySource, LoadKeys, plan_datastore
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
    build = plan_build(run)
    missing = len(prepare_folder(build)[0])
    started = time.perf_counter()
    factory = LoadKeys(key_source, run.model_folder, max(1, int(c.datastore.cpus_per_actor)))
    if missing:
        cluster = ray_cluster(c.ray, c.datastore.cpus_per_actor, c.datastore.gpus_per_actor, readers=1)
        with cluster, track("datastore", missing, "shards") as bar:
            manifest = run_build(build, factory, lambda info: bar.advance(1, info.rows))
        new = bar.rows
    else:
        manifest, new = run_build(build, factory), 0
    size = sum(shard.bytes for shard in manifest.shards)
    rate = new / (time.perf_counter() - started)
    return {
        "rows": manifest.rows,
        "hidden_size": manifest.hidden_size,
        "bytes": size,
        "rows_per_second": round(rate, 1),
        "summary": f"{manifest.rows:,} keys of {manifest.hidden_size} {manifest.key_dtype}, {size / 2**20:,.1f} MiB, "
        f"{rate:,.0f} rows/s",
    }


def plan_build(run: TrimeRun, split: str = "train") -> MemoryBuild:
    """The datastore of a split."""
    stream = TokenStream.open(run.path("prepare"), split)
    length, context = window_of(run.config)
    card = card_of(run.model_folder, stream.eos_id)
    folder = run.path("datastore")
    return plan_datastore(folder, with_eos(stream), card, run.folder.name, split, run.config.datastore, length, context)


def with_eos(stream: TokenStream) -> np.ndarray:
    """The tokens of a split behind the `<eos>` that its first one is predicted from."""
    return np.concatenate([[stream.eos_id], stream.token_T]).astype(np.int64)


def card_of(folder: Path, eos_id: int, model: TrainableLM | None = None) -> ModelCard:
    """What names a TRIME model in a datastore: of its name, the run's folder is enough to tell people."""
    model = model or load_model(folder)
    name = folder.parent.parent.name if folder.name == "model" else folder.name
    sizes = (model.hidden_size, model.vocabulary_size, model.max_positions)
    return ModelCard(name, read_fingerprint(folder), *sizes, (eos_id,))


def key_source(folder: Path, device: torch.device) -> KeySource:
    """The keys of a model that is read from a folder."""
    return KeySource(load_model(folder).to(device), device)
