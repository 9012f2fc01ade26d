"""Stage 3 of a run: the external memory of every split, by PLM actors on Ray Data."""

from __future__ import annotations

import time
from typing import Any

from pema_ray.cluster import ray_cluster
from pema_ray.config import ExperimentConfig
from pema_ray.memory.build import MemoryBuild, prepare_folder, run_builds
from pema_ray.memory.manifest import Manifest
from pema_ray.progress import track
from pema_ray.stages.plm import factory
from pema_ray.stages.run import Run


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `build_memory/<split>/` for every configured split."""
    run = Run(config)

    def work() -> dict[str, Any]:
        chosen = config.build_memory
        builds = [plan_memory(run, split) for split in chosen.splits]
        for build in builds:
            build.check()
        missing = sum(len(prepare_folder(build)[0]) for build in builds)
        make_source = factory(config.plm, chosen.cpus_per_actor, run.bundle.card)
        started = time.perf_counter()
        if not missing:
            return measure_memory(run_builds(builds, make_source), 0, 1.0)
        with (
            ray_cluster(config.ray, chosen.cpus_per_actor, chosen.gpus_per_actor, readers=1),
            track("memory", missing, "shards") as bar,
        ):
            manifests = run_builds(builds, make_source, lambda info: bar.advance(1, info.rows))
        return measure_memory(manifests, bar.rows, time.perf_counter() - started)

    return run.perform("build_memory", work)


def plan_memory(run: Run, split: str) -> MemoryBuild:
    """What a split's memory will be, from the prepared pairs and the run's prompts."""
    prompter = run.prompter()
    examples = [prompter.encode_pair(pair) for pair in run.pairs(split)]
    return MemoryBuild(
        folder=run.path("build_memory", split),
        examples=examples,
        card=run.bundle.card,
        task=run.task.name,
        split=split,
        config=run.config.build_memory,
        shared_tokens=prompter.shared_tokens,
    )


def measure_memory(manifests: list[Manifest], new_rows: int, seconds: float) -> dict[str, Any]:
    """The stage's metrics; `new_rows` were made in `seconds`."""
    shards = [shard for manifest in manifests for shard in manifest.shards]
    tokens, padded = sum(s.tokens for s in shards), sum(s.padded_tokens for s in shards)
    total, rate = sum(s.rows for s in shards), new_rows / seconds
    new = f"{new_rows:,} new, {rate:,.0f} rows/s" if new_rows else "none new"
    return {
        "rows": {manifest.split: manifest.rows for manifest in manifests},
        "bytes": sum(s.bytes for s in shards),
        "shards": len(shards),
        "rejected": {manifest.split: manifest.rejected for manifest in manifests},
        "padding_share": round(1 - tokens / padded, 4),
        "new_rows": new_rows,
        "rows_per_second": round(rate, 1) if new_rows else None,
        "summary": f"{total:,} rows ({new}), "
        f"{sum(s.bytes for s in shards) / 2**20:,.0f} MiB, {1 - tokens / padded:.1%} padding",
    }
