"""`pema-ray trime index`: the datastore's index, part by part, and its recall on keys of dev tokens."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.memory.search.config import IndexConfig
from pema_ray.memory.search.index import IndexBuild, load_parts
from pema_ray.memory.search.nearest import OnePieceSearch, SearchOptions, recall
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
    if len(missing) > 1 and c.actors > 1:
        with ray_cluster(run.config.ray, c.cpus_per_actor), track("index", len(missing), "parts") as bar:
            for _ in add_parts(build, missing, c):
                bar.advance(1)
    else:
        with track("index", len(missing), "parts") as bar:
            for number in missing:
                build.add(number)
                bar.advance(1)
    info = build.finish()
    told: dict[str, Any] = {"rows": info.rows, "bytes": info.bytes, "parts": len(build.parts), "lists": info.lists}
    said = f"exact search over {info.rows:,} keys"
    if info.kind != "exact":
        told |= measure_recall(run, dev)
        k, found = told["recall_at"], f"{told['recall']:.3f}, rescored {told['recall_rescored']:.3f}"
        said = f"{info.kind} over {info.rows:,} keys, {info.bytes / 2**20:,.1f} MiB; recall@{k} {found}"
    return {**told, "summary": said}


def add_parts(build: IndexBuild, missing: list[int], config: IndexConfig):
    """Parts by Ray tasks, as they come; a generator of part numbers."""
    import ray

    task: Any = ray.remote(num_cpus=config.cpus_per_actor)(_add)
    waiting = {task.remote(build, number): number for number in missing[: config.actors]}
    left = missing[config.actors :]
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        ray.get(done)
        yield waiting.pop(done)
        if left:
            number = left.pop(0)
            waiting[task.remote(build, number)] = number


def _add(build: IndexBuild, number: int) -> None:
    build.add(number)


def measure_recall(run: TrimeRun, dev: TokenStream) -> dict[str, Any]:
    """Of the index as it is asked by `evaluate`, with and without rescoring, and seconds of both searches."""
    c, e = run.config.index, run.config.evaluate
    query_NH = dev_keys(run, dev, c.recall_queries)
    store = open_datastore(run.path("datastore"), None)
    k = min(c.recall_at, len(store))

    def ask(index: Path | None, rescore: bool):
        options = SearchOptions(c.metric, e.probes, rescore, e.oversample)
        search = OnePieceSearch(load_parts(store, index, options))
        search.search(query_NH[:1], k)
        started = time.perf_counter()
        return search.search(query_NH, k), time.perf_counter() - started

    exact, exact_seconds = ask(None, False)
    plain, seconds = ask(run.path("index"), False)
    rescored, rescored_seconds = ask(run.path("index"), True)
    return {
        "recall_at": k,
        "recall": round(recall(plain, exact), 4),
        "recall_rescored": round(recall(rescored, exact), 4),
        "queries": len(query_NH),
        "seconds": {"exact": exact_seconds, "index": seconds, "index_rescored": rescored_seconds},
    }


@torch.inference_mode()
def dev_keys(run: TrimeRun, dev: TokenStream, count: int) -> np.ndarray:
    """`[count, H]`: keys of the dev split's first tokens, what a search will be asked."""
    device = pick_device(run.config.evaluate.device)
    model = load_model(run.model_folder).to(device)
    length, context = window_of(run.config)
    windows = math.ceil(count / (length - context)) + 1
    tokens = with_eos(dev)[: windows * length]
    probe = Probe(length, context)
    keys = [s.key_NH.cpu() for batch in walk(model, Text(torch.from_numpy(tokens).to(device)), probe) for s in batch]
    return torch.cat(keys)[:count].numpy()
