"""Builds external memories on Ray Data: one pipeline for any PLM, and the manifest comes last.

Shard numbers → tasks read and tokenise each shard's examples (actors do, where these are few or no CPU is spare) →
actors ask the PLM, encode and write. A finished shard leaves a receipt beside it; a build that was stopped skips the
shards that have one. Knows no owner: the PLM is handed in as a factory of a client, called once in every actor.
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
from pema_ray.memory.planning import find_or_make_plan, number_rows, prepare_folder, remove_leftovers
from pema_ray.memory.rows import Extractor
from pema_ray.memory.shard_worker import ShardWorker, tokenise
from pema_ray.memory.specification import MemoryBuild
from pema_ray.memory.waits import OnWait, showing
from pema_ray.runtime.files import one_process
from pema_ray.runtime.placement import for_tasks, matching_resource, ray_options

Factory = Callable[[], Extractor]
_ARRIVAL_SECONDS = 60.0  # network disks show a new file after a while
_CALLS_AT_ONCE = 2  # of one actor: the next shard's requests follow while the last answers of one are awaited


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
        on_wait: called, from another thread, with what actors wait for, and "" when none waits any more.

    Raises:
        UserError: what an actor was refused, and the next start goes on from there; or another process builds there.
        FingerprintMismatch: another PLM than the card's has answered.
    """
    with ExitStack() as locks:
        for build in builds:
            locks.enter_context(one_process(build.folder))
        return _run_builds(builds, factory, on_shard, on_wait)


def _run_builds(
    builds: Sequence[MemoryBuild],
    factory: Factory,
    on_shard: Callable[[ShardInfo], None] | None,
    on_wait: OnWait | None,
) -> list[Manifest]:
    for build in builds:
        find_or_make_plan(build)
    todo: list[tuple[int, int]] = []
    done: list[list[ShardInfo]] = []
    for number, build in enumerate(builds):
        missing, found = prepare_folder(build)
        todo += [(number, shard) for shard in missing]
        done.append(found)
    if todo:
        for number, info in _compute(builds, todo, factory, on_wait):
            done[number].append(info)
            if on_shard:
                on_shard(info)
    return [_write_manifest(build, found) for build, found in zip(builds, done, strict=True)]


def stream_shards(build: MemoryBuild, factory: Factory, board: Any = None) -> Any:
    """A lazy Ray data set that builds a memory as it is read: one row a shard, in the order of the plan.

    A row holds `info`, the receipt of a shard that is now on disk, or `error`, what was refused. Finished shards
    pass through at once. `run_build` then makes what was not read, and writes the manifest.

    Args:
        board: where actors tell what they wait for (`memory.waits`).
    """
    build = replace(build, config=build.config.model_copy(update={"max_actors": None}))  # others need the room
    plan = find_or_make_plan(build)
    prepare_folder(build)
    data = _dataset([build], [(0, number) for number, rows in enumerate(plan.rows) if rows], factory, board)
    data.context.execution_options.preserve_order = True
    return data


def _write_manifest(build: MemoryBuild, done: Sequence[ShardInfo]) -> Manifest:
    remove_leftovers(build.folder)  # of an ended run's actors, which may have died after this one began
    done = [info for info in done if info.rows]  # counted out to the last row: the PLM ended before any that is new
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
    """Wait until a shard that a node wrote is to be seen from here.

    Raises:
        UserError: it is not; the nodes share no disk.
    """
    deadline = time.monotonic() + _ARRIVAL_SECONDS
    while not shard.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{shard}: was written on node {node}, but is not to be seen from {socket.gethostname()}. Every node "
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
    most = max(actors, min(config.max_actors or 0, len(todo)))
    spare = matching_resource(for_tasks(placement), "CPU") - most * config.cpus_per_actor
    if spare >= 1 and not all(build.examples.at_hand for build in builds):  # else actors tokenise: tasks would starve
        data = data.map_batches(
            tokenise,
            batch_size=1,
            fn_kwargs={"builds": [replace(build) for build in builds]},  # without weights
            num_cpus=1,
            **ray_options(for_tasks(placement)),
            # Never reached; that it is not the size of the actor pool keeps Ray Data from fusing the two.
            compute=ray.data.TaskPoolStrategy(size=most + int(spare)),
        )
    pool = ray.data.ActorPoolStrategy(
        min_size=actors,
        max_size=most,
        max_tasks_in_flight_per_actor=2 * _CALLS_AT_ONCE,
        max_concurrent_calls_per_actor=_CALLS_AT_ONCE,
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
