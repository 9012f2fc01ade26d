"""`pema-ray build-memory`: every split's external memory, by Ray Data actors that hold the PLM or ask its owner."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pema_ray.errors import UserError
from pema_ray.line import PLMClient
from pema_ray.memory.build import run_builds
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import PreparedPairs, Wording, read_pairs
from pema_ray.memory.manifest import Manifest
from pema_ray.memory.planning import find_or_make_plan, find_plan, prepare_folder
from pema_ray.memory.specification import MemoryBuild
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.plm import connector
from pema_ray.pema.run import Run
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.placement import PlacementConfig, for_tasks
from pema_ray.runtime.progress import ProgressBar, track
from pema_ray.tasks.shots import first_shots

_CLIENT_CPUS = 0.25  # an actor without a PLM only waits for answers, encodes and writes


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `build_memory/<split>/` for every configured split."""
    run = Run(config)

    def work() -> dict[str, Any]:
        settings = actor_settings(config)
        builds = list(plan_memories(run).values())
        client = plm_client(run)
        if all(find_plan(build) and not prepare_folder(build)[0] for build in builds):
            return measure_memory(run_builds(builds, client), 0, 1.0)
        cpus, gpus = settings.cpus_per_actor, settings.gpus_per_actor
        with ray_cluster(config.ray, cpus, gpus, readers=1, placement=actor_placement(config)):
            missing = count_missing(builds)
            started = time.perf_counter()
            with track("memory", missing, "shards") as bar:
                manifests = run_builds(builds, client, lambda info: bar.advance(1, info.rows), showing_waits(bar))
            return measure_memory(manifests, bar.rows, time.perf_counter() - started)

    return run.perform("build_memory", work)


def actor_settings(config: ExperimentConfig) -> BuildMemoryConfig:
    """The build's settings, with the resources of one actor.

    Raises:
        UserError: actors without a PLM request GPUs.
    """
    settings = config.build_memory
    if config.plm.is_own:
        return settings
    if settings.gpus_per_actor:
        raise UserError(
            f"build_memory.gpus_per_actor={settings.gpus_per_actor:g}: {config.plm.label} uses its owner's GPUs; "
            "these actors are only its clients. Leave gpus_per_actor at 0."
        )
    return settings.model_copy(update={"cpus_per_actor": _CLIENT_CPUS})


def actor_placement(config: ExperimentConfig) -> PlacementConfig:
    """Nodes of the build's actors; actors without a PLM need no accelerator."""
    return config.placement if config.plm.is_own else for_tasks(config.placement)


def plan_memories(run: Run) -> dict[str, MemoryBuild]:
    """The memory to build of each configured split, from the prepared pairs and the run's prompts."""
    prompts, settings = wording(run), actor_settings(run.config)
    shared_tokens = prompts.prompter().shared_tokens if settings.prompts else 0
    end_token = prompts.prompter().end_token if prompts.chat else None
    return {
        split: MemoryBuild(
            folder=run.path("build_memory", split),
            examples=PreparedPairs(run.path("prepare", f"{split}.parquet"), prompts),
            card=run.bundle.card,
            task=run.task.name,
            split=split,
            config=settings,
            shared_tokens=shared_tokens,
            end_token=end_token,
            placement=actor_placement(run.config),
        )
        for split in settings.splits
    }


def wording(run: Run) -> Wording:
    """The wording of the run's prompts."""
    task, train = run.config.task, run.path("prepare", "train.parquet")
    bundle, extra = run.path("export_head", "lm_head"), task.chat_template_kwargs
    if task.shots and task.show == "similar":
        return Wording(bundle, run.task, task.chat, similar=train, shots=task.shots, chat_template_kwargs=extra)
    shots = first_shots(read_pairs(train), task.shots) if task.shots else []
    return Wording(bundle, run.task, task.chat, tuple(shots), chat_template_kwargs=extra)


def plm_client(run: Run) -> Callable[[], PLMClient]:
    """A function that connects an actor to the PLM."""
    settings, card = actor_settings(run.config), run.bundle.card
    engine = {"slots": settings.sequences, "max_tokens": None}  # pass_tokens as in a service, for the same bytes
    return connector(run.config.plm, card, settings.cpus_per_actor, engine if run.config.plm.is_own else None)


def count_missing(builds: list[MemoryBuild]) -> int:
    """Plan the memories without a plan, with a progress bar; returns the number of missing shards."""
    unplanned = sum(build.shards for build in builds if not find_plan(build))
    with track("planning", unplanned, "shards") as bar:
        for build in builds:
            find_or_make_plan(build, bar.advance)
    return sum(len(prepare_folder(build)[0]) for build in builds)


def showing_waits(bar: ProgressBar) -> Callable[[str], None]:
    """A function that shows on the progress bar what the build waits for."""

    def show(text: str) -> None:
        bar.note = text
        bar.show()

    return show


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
