"""`pema-ray trime index`: the datastore's index, part by part, and its recall on keys of dev tokens."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.memory.search.config import IndexConfig
from pema_ray.memory.search.index import IndexBuild, load_parts
from pema_ray.memory.search.nearest import RECALL_QUERIES, OnePieceSearch, SearchOptions, recall
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.hardware import pick_device
from pema_ray.runtime.progress import track
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.evaluation.statistics import Probe, Text, walk
from pema_ray.trime.evaluation.systems import window_of
from pema_ray.trime.model.registry import load_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.datastore import card_of, with_eos
from pema_ray.trime.text.segments import TokenStream


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `index/`."""
    run = TrimeRun(config)
    return run.perform("index", lambda: _build(run))


def _build(run: TrimeRun) -> dict[str, Any]:
    c = run.config.index
    dev = TokenStream.open(run.path("prepare"), "dev")
    store = open_datastore(run.path("datastore"), card_of(run.model_folder, dev.eos_id))
    build = IndexBuild(run.path("index"), store, c, run.config.seed)
    build.prepare()
    missing = build.missing
    on_ray = len(missing) > 1 and c.actors > 1
    cluster = ray_cluster(run.config.ray, c.cpus_per_actor) if on_ray else nullcontext()
    with cluster, track("index", len(missing), "parts") as bar:
        for _ in add_parts(build, missing, c) if on_ray else map(build.add, missing):
            bar.advance(1)
    info = build.finish()
    metrics: dict[str, Any] = {"rows": info.rows, "bytes": info.bytes, "parts": len(build.parts), "lists": info.lists}
    summary = f"exact search over {info.rows:,} keys"
    if info.kind != "exact":
        metrics |= measure_recall(run, dev)
        shares = f"{metrics['recall']:.3f}, rescored {metrics['recall_rescored']:.3f}"
        summary = f"{info.kind} over {info.rows:,} keys, {info.bytes / 2**20:,.1f} MiB; "
        summary += f"recall@{metrics['recall_at']} {shares}"
    return {**metrics, "summary": summary}


def add_parts(build: IndexBuild, missing: list[int], config: IndexConfig):
    """Add parts by Ray tasks; yields the number of each finished part."""
    import ray

    def add(build: IndexBuild, number: int) -> None:
        build.add(number)

    task: Any = ray.remote(num_cpus=config.cpus_per_actor)(add)
    running = {task.remote(build, number): number for number in missing[: config.actors]}
    rest = missing[config.actors :]
    while running:
        (done, *_), _ = ray.wait(list(running))
        ray.get(done)
        yield running.pop(done)
        if rest:
            number = rest.pop(0)
            running[task.remote(build, number)] = number


def measure_recall(run: TrimeRun, dev: TokenStream) -> dict[str, Any]:
    """Recall of the index as `evaluate` searches it, with and without rescoring, and the seconds of the searches."""
    c, e = run.config.index, run.config.evaluate
    query_NH = dev_keys(run, dev, RECALL_QUERIES)
    store = open_datastore(run.path("datastore"), None)
    k = min(c.recall_at, len(store))

    def timed_search(index: Path | None, rescore: bool):
        options = SearchOptions(c.metric, e.probes, rescore, e.oversample)
        search = OnePieceSearch(load_parts(store, index, options))
        search.search(query_NH[:1], k)
        started = time.perf_counter()
        return search.search(query_NH, k), time.perf_counter() - started

    exact, exact_seconds = timed_search(None, False)
    plain, seconds = timed_search(run.path("index"), False)
    rescored, rescored_seconds = timed_search(run.path("index"), True)
    return {
        "recall_at": k,
        "recall": round(recall(plain, exact), 4),
        "recall_rescored": round(recall(rescored, exact), 4),
        "queries": len(query_NH),
        "seconds": {"exact": exact_seconds, "index": seconds, "index_rescored": rescored_seconds},
    }


@torch.inference_mode()
def dev_keys(run: TrimeRun, dev: TokenStream, count: int) -> np.ndarray:
    """`[count, H]`: keys of the dev split's first tokens, the queries that recall is measured with."""
    device = pick_device(run.config.evaluate.device)
    model = load_model(run.model_folder).to(device)
    length, context = window_of(run.config)
    windows = math.ceil(count / (length - context)) + 1
    tokens = with_eos(dev)[: windows * length]
    probe = Probe(length, context)
    keys = [s.key_NH.cpu() for batch in walk(model, Text(torch.from_numpy(tokens).to(device)), probe) for s in batch]
    return torch.cat(keys)[:count].numpy()
