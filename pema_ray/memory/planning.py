"""The plan of a build, counted once and kept on disk, and which of its shards are finished.

Only tokens show which examples the PLM cannot take: every shard is counted before the PLM works, by Ray tasks if
examples have to be tokenised, and `plan.json` keeps the counts. The process that plans holds no examples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.memory.manifest import MANIFEST, Manifest, ShardInfo
from pema_ray.memory.plan import Rejected
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.runtime.cluster import data_set
from pema_ray.runtime.files import atomic_file, remove_temporary_files
from pema_ray.runtime.placement import for_tasks, ray_options
from pema_ray.tasks.sources import name_of_example

_PLAN = "plan.json"
REJECTED = "rejected.parquet"
_MAX_BLOCKS = 1024  # Ray Data keeps some 30 KB a block in the driver
OnCounted = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """The contents of each shard of a build, by number; rows are those of targets.

    `rows` is exact for a teacher-forced memory and an upper limit for a generated one.
    """

    examples: tuple[int, ...]
    rows: tuple[int, ...]
    rejected: int
    first_rejected: tuple[Rejected, ...]
    """The first `max_rejected` + 1, in the order of the examples."""


def planned_rows(build: MemoryBuild) -> int:
    """Number of rows of a teacher-forced memory; see `find_or_make_plan`."""
    return sum(find_or_make_plan(build).rows)


def planned_mean_weight(build: MemoryBuild) -> float:
    """Mean number of occurrences of each of these rows."""
    repeated = sum(weight - 1 for weights in (build.weights or {}).values() for weight in weights if weight)
    return 1 + repeated / planned_rows(build)


def prepare_folder(build: MemoryBuild) -> tuple[list[int], list[ShardInfo]]:
    """Prepare the folder; returns `(numbers of missing shards, receipts of finished ones)`.

    Raises:
        UserError: as `find_or_make_plan` does.
    """
    plan = find_or_make_plan(build)
    remove_temporary_files(build.folder)
    todo, done = [], []
    for number, rows in enumerate(plan.rows):
        if rows:
            receipt = read_receipt(build.folder / shard_name(number))
            done.append(receipt) if receipt else todo.append(number)
    return todo, done


def find_or_make_plan(build: MemoryBuild, on_counted: OnCounted = lambda shards: None) -> Plan:
    """The plan in a build's folder, or a new one, which is then saved there. A new plan of examples that are not at
    hand needs Ray.

    Args:
        on_counted: called with the number of newly counted shards.

    Raises:
        UserError: more examples are bad than `max_rejected` allows, or none is left, or the folder holds a memory
            built with other settings and `overwrite` is off.
    """
    if not len(build.examples):
        raise UserError(f"Split '{build.split}' has no examples to build a memory from.")
    saved = find_plan(build)
    plan = saved or _count(build, on_counted)
    _check(build, plan)
    if saved is None:
        _save(build, plan)
    return plan


def find_plan(build: MemoryBuild) -> Plan | None:
    """The plan of exactly this build, if its folder holds one.

    Raises:
        UserError: it holds another, and `overwrite` is off.
    """
    if not (build.folder / _PLAN).exists():
        return None
    try:
        saved = json.loads((build.folder / _PLAN).read_text())
        plan_hash = str(saved["plan_hash"])
        if plan_hash == build.plan_hash:
            rows = pq.read_table(build.folder / REJECTED).to_pylist() if saved["rejected"] else []
            rejected = tuple(Rejected(**row) for row in rows)
            return Plan(tuple(saved["examples"]), tuple(saved["rows"]), saved["rejected"], rejected)
    except (OSError, ValueError, KeyError, TypeError):
        plan_hash = "unreadable"
    if build.config.overwrite:
        return None
    if (build.folder / MANIFEST).exists():
        manifest = Manifest.read(build.folder)
        if not manifest.belongs_to(build.card):
            raise FingerprintMismatch(f"The memory {build.folder}", manifest.plm_label, build.card.label)
    raise UserError(
        f"{build.folder}: holds a memory built from other examples or with other settings (plan {plan_hash}, this "
        f"run's is {build.plan_hash}). Choose another run_dir, or set build_memory.overwrite=true."
    )


def finished_shards(folder: Path) -> list[ShardInfo]:
    """Receipts of the finished shards, in the order of the plan."""
    names = (path.name.split(".")[0] for path in sorted(folder.glob("shard-*.receipt.json")))
    receipts = (read_receipt(folder / f"{name}.parquet") for name in names)
    return [receipt for receipt in receipts if receipt]


def receipt_path(shard: Path) -> Path:
    return shard.with_suffix(".receipt.json")


def read_receipt(shard: Path) -> ShardInfo | None:
    """The receipt of a shard, if its file exists and has the receipt's size."""
    try:
        info = ShardInfo.model_validate_json(receipt_path(shard).read_bytes())
        return info if shard.stat().st_size == info.bytes else None
    except (FileNotFoundError, ValidationError):
        return None


def _check(build: MemoryBuild, plan: Plan) -> None:
    limit = build.config.max_rejected
    if plan.rejected > limit:
        first, others = plan.first_rejected[0], plan.rejected - 1
        more = f" ({others:,} more are bad.)" if others else ""
        raise UserError(
            f"Split '{build.split}', {name_of_example(first.example_id)}: {first.reason}.{more} "
            f"Shorten or remove them, or set build_memory.max_rejected={plan.rejected} to have them set aside."
        )
    if not any(plan.examples):
        raise UserError(f"Split '{build.split}': all {len(build.examples):,} examples are bad.")


def _save(build: MemoryBuild, plan: Plan) -> None:
    """Clear the folder and write the plan, last."""
    if (build.folder / _PLAN).exists():
        shutil.rmtree(build.folder)
    build.folder.mkdir(parents=True, exist_ok=True)
    for path in (*build.folder.glob("shard-*"), *build.folder.glob(MANIFEST)):
        path.unlink()  # left of another plan by an interrupted removal
    if plan.rejected:
        with atomic_file(build.folder / REJECTED) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(example) for example in plan.first_rejected]), temporary)
    counts = {"examples": plan.examples, "rows": plan.rows, "rejected": plan.rejected}
    with atomic_file(build.folder / _PLAN) as temporary:
        temporary.write_text(json.dumps({"plan_hash": build.plan_hash, **counts}) + "\n")


# ── counting ────────────────────────────────────────────────────────────────


def _count(build: MemoryBuild, on_counted: OnCounted) -> Plan:
    examples, rows, rejected, first = [0] * build.shards, [0] * build.shards, 0, []
    for counted in _counted_shards(build):
        if counted["error"]:
            raise UserError(counted["error"])
        number = counted["shard"]
        examples[number], rows[number] = counted["examples"], counted["rows"]
        rejected += counted["bad"]
        first += [Rejected(**fields) for fields in json.loads(counted["rejected"])]
        del first[build.config.max_rejected + 1 :]
        on_counted(1)
    return Plan(tuple(examples), tuple(rows), rejected, tuple(first))


def _counted_shards(build: MemoryBuild) -> Iterator[dict[str, Any]]:
    """One row a shard, in order."""
    if build.examples.at_hand or build.weights is not None:  # weights were counted from all examples, in this process
        yield from (count_shard(build, number) for number in range(build.shards))
        return
    counts = number_rows([(0, number) for number in range(build.shards)]).map_batches(
        _count_batch, batch_size=1, fn_kwargs={"build": build}, num_cpus=1, **ray_options(for_tasks(build.placement))
    )
    counts.context.execution_options.preserve_order = True
    yield from counts.iter_rows()


def _count_batch(batch: dict[str, Any], build: MemoryBuild) -> dict[str, list[Any]]:
    """`count_shard` for Ray Data."""
    rows = [count_shard(build, number) for number in batch["shard"].tolist()]
    return {name: [row[name] for row in rows] for name in rows[0]}


def count_shard(build: MemoryBuild, number: int) -> dict[str, Any]:
    """The contents of a shard as a row of Ray Data, with the first bad examples as JSON."""
    row = {"shard": number, "examples": 0, "rows": 0, "bad": 0, "rejected": "[]", "error": ""}
    try:
        shard, bad = build.shard(number, build.read(number))
    except UserError as error:  # returned as data: Ray would bury its one line in a traceback
        return {**row, "error": str(error)}
    rows = 0
    for example in shard.examples:
        weights = (shard.weights or {}).get(example.example_id)
        rows += len(example.target) + build.eos_row if weights is None else sum(weight > 0 for weight in weights)
    rejected = json.dumps([asdict(example) for example in bad[: build.config.max_rejected + 1]])
    return {**row, "examples": len(shard.examples), "rows": rows, "bad": len(bad), "rejected": rejected}


def number_rows(numbers: Sequence[tuple[int, int]]) -> Any:
    """A Ray data set of (build, shard) numbers, in few enough blocks for any number of shards."""
    rows = [{"build": build, "shard": shard} for build, shard in numbers]
    return data_set(rows, min(len(rows), _MAX_BLOCKS))
