"""Builds external memories on Ray Data: one pipeline for any PLM, and the manifest comes last.

Shard numbers → tasks read and tokenise each shard's examples (actors do, if these are few or no CPU is spare) →
actors query the PLM, encode and write. A finished shard has a receipt beside it; a resumed build skips these shards.
Knows no owner: the PLM comes as a factory of a client, called once in every actor.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.memory.manifest import Manifest, ShardInfo
from pema_ray.memory.planning import find_or_make_plan, number_rows, prepare_folder
from pema_ray.memory.rows import Extractor
from pema_ray.memory.shard_worker import ShardWorker, tokenise
from pema_ray.memory.specification import MemoryBuild
from pema_ray.memory.waits import OnWait, showing
from pema_ray.runtime.files import one_process, remove_temporary_files
from pema_ray.runtime.placement import for_tasks, matching_resource, ray_options

Factory = Callable[[], Extractor]
_ARRIVAL_SECONDS = 60.0  # network disks show a new file after a while
_CONCURRENT_CALLS = 2  # of one actor: the next shard's requests follow while one awaits its last answers


def run_build(
    build: MemoryBuild,
    factory: Factory,
    on_shard: Callable[[ShardInfo], None] | None = None,
    on_wait: OnWait | None = None,
) -> Manifest:
    """`run_builds` of a single memory."""
    return run_builds([build], factory, on_shard, on_wait)[0]


def run_builds(
    builds: Sequence[MemoryBuild],
    factory: Factory,
    on_shard: Callable[[ShardInfo], None] | None = None,
    on_wait: OnWait | None = None,
) -> list[Manifest]:
    """Compute what is missing of every memory, with one set of actors, and write the manifests.

    Ray must be running if anything is missing. The builds share their settings, their PLM and their placement.

    Args:
        factory: makes the PLM's client inside an actor, a `PLMClient` for the generated context; must be picklable.
        on_shard: called with each shard as it is finished.
        on_wait: called, from another thread, with what actors wait for, and with "" when none waits.

    Raises:
        UserError: of an actor (the next start resumes the build); or another process builds there.
        FingerprintMismatch: another PLM than the card's has answered.
    """
    with ExitStack() as locks:
        for build in builds:
            locks.enter_context(one_process(build.folder))
        for build in builds:
            find_or_make_plan(build)
        todo: list[tuple[int, int]] = []
        done: list[list[ShardInfo]] = []
        for number, build in enumerate(builds):
            missing, finished = prepare_folder(build)
            todo += [(number, shard) for shard in missing]
            done.append(finished)
        if todo:
            for number, info in _compute(builds, todo, factory, on_wait):
                done[number].append(info)
                if on_shard:
                    on_shard(info)
        return [_write_manifest(build, finished) for build, finished in zip(builds, done, strict=True)]


def stream_shards(build: MemoryBuild, factory: Factory, board: Any = None) -> Any:
    """A lazy Ray data set that builds a memory as it is read: one row a shard, in the order of the plan.

    A row holds `info`, the receipt of a shard that is now on disk, or `error`, a user's error. Finished shards pass
    through at once. `run_build` then makes the shards that were not read, and writes the manifest.

    Args:
        board: shows what actors wait for (`memory.waits`).
    """
    build = replace(build, config=build.config.model_copy(update={"max_actors": None}))  # training runs beside it
    plan = find_or_make_plan(build)
    prepare_folder(build)
    data = _dataset([build], [(0, number) for number, rows in enumerate(plan.rows) if rows], factory, board)
    data.context.execution_options.preserve_order = True
    return data


def _write_manifest(build: MemoryBuild, done: Sequence[ShardInfo]) -> Manifest:
    remove_temporary_files(build.folder)  # of an earlier run's actors, which may have died after this one began
    done = [info for info in done if info.rows]  # deduplicated shards may be empty: the PLM ended before any new row
    manifest = Manifest(
        plm_name=build.card.name,
        fingerprint=build.card.fingerprint,
        hidden_size=build.card.hidden_size,
        vocab_size=build.card.vocab_size,
        eos_token_id=build.eos_token_ids[0],
        task=build.task,
        split=build.split,
        context=build.context,
        key_dtype=build.config.key_dtype,
        plan_hash=build.plan_hash,
        prompt_from=build.prompt_from,
        rows=sum(info.rows for info in done),
        examples=sum(info.examples for info in done),
        rejected=find_or_make_plan(build).rejected,
        shards=tuple(sorted(done, key=lambda info: info.name)),
    )
    manifest.save(build.folder)
    return manifest


def _compute(
    builds: Sequence[MemoryBuild], todo: Sequence[tuple[int, int]], factory: Factory, on_wait: OnWait | None
) -> Iterator[tuple[int, ShardInfo]]:
    with showing(on_wait) if on_wait else nullcontext() as board:
        for row in _dataset(builds, todo, factory, board).iter_rows():
            if row["error"]:
                raise pickle.loads(row["refusal"])
            info = ShardInfo.model_validate_json(row["info"])
            await_shard(builds[row["build"]].folder / info.name, row["node"])
            yield row["build"], info


def await_shard(shard: Path, node: str) -> None:
    """Wait until a shard that another node wrote is visible here.

    Raises:
        UserError: it does not appear; the nodes share no disk.
    """
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    while not shard.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{shard}: was written on node {node}, but is not visible from {socket.gethostname()}. Every node "
                "needs the same folder under this path: put run_dir on a disk that all nodes share (NFS, a mounted "
                "bucket), or run the stages on one node."
            )
        time.sleep(0.2)


def _dataset(builds: Sequence[MemoryBuild], todo: Sequence[tuple[int, int]], factory: Factory, board: Any) -> Any:
    import ray
    import ray.data

    config, placement = builds[0].config, builds[0].placement
    for build in builds:
        _ = build.weights  # counted here, not in every actor
    data = number_rows(todo)
    actors = min(config.actors, len(todo))
    max_actors = max(actors, min(config.max_actors or 0, len(todo)))
    spare = matching_resource(for_tasks(placement), "CPU") - max_actors * config.cpus_per_actor
    if spare >= 1 and not all(build.examples.at_hand for build in builds):  # else actors tokenise: tasks would starve
        data = data.map_batches(
            tokenise,
            batch_size=1,
            fn_kwargs={"builds": [replace(build) for build in builds]},  # without weights
            num_cpus=1,
            **ray_options(for_tasks(placement)),
            # Never reached; a size other than the actor pool's keeps Ray Data from fusing the two.
            compute=ray.data.TaskPoolStrategy(size=max_actors + int(spare)),
        )
    pool = ray.data.ActorPoolStrategy(
        min_size=actors,
        max_size=max_actors,
        max_tasks_in_flight_per_actor=2 * _CONCURRENT_CALLS,
        max_concurrent_calls_per_actor=_CONCURRENT_CALLS,
    )
    return data.map_batches(
        ShardWorker,
        fn_constructor_args=(ray.put(list(builds)), factory, board),
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
        **ray_options(placement),
    )
