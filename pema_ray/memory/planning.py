"""What a build will make, and how much of it is there: the plan on disk, counted once and kept.

Which examples the PLM cannot take is known only from their tokens: every shard is counted before the PLM works, by Ray
tasks where examples have to be tokenised, and the counts are kept in `plan.json`. The process that plans holds no
examples.
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
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.placement import for_tasks, ray_options
from pema_ray.tasks.sources import name_of_example

_PLAN = "plan.json"
REJECTED = "rejected.parquet"
_MOST_BLOCKS = 1024  # Ray Data keeps some 30 KB a block in the driver
OnCounted = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What each shard of a build will hold, by number; rows are those of targets.

    `rows` is exact for a teacher-forced memory and the most there can be for a generated one.
    """

    examples: tuple[int, ...]
    rows: tuple[int, ...]
    rejected: int
    first_rejected: tuple[Rejected, ...]
    """As many as may be set aside, and one more, in the order of the examples."""


def planned_rows(build: MemoryBuild) -> int:
    """How many rows a teacher-forced memory will have; see `find_or_make_plan`."""
    return sum(find_or_make_plan(build).rows)


def planned_mean_weight(build: MemoryBuild) -> float:
    """How often each of these rows occurs, on average."""
    repeated = sum(weight - 1 for weights in (build.weights or {}).values() for weight in weights if weight)
    return 1 + repeated / planned_rows(build)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of actors that were killed while they wrote."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def prepare_folder(build: MemoryBuild) -> tuple[list[int], list[ShardInfo]]:
    """Make the folder ready and say what is left: `(numbers of shards to do, receipts of finished ones)`.

    Raises:
        UserError: as `find_or_make_plan` does.
    """
    plan = find_or_make_plan(build)
    remove_leftovers(build.folder)
    todo, done = [], []
    for number, rows in enumerate(plan.rows):
        if rows:
            receipt = read_receipt(build.folder / shard_name(number))
            done.append(receipt) if receipt else todo.append(number)
    return todo, done


def find_or_make_plan(build: MemoryBuild, on_counted: OnCounted = lambda shards: None) -> Plan:
    """The plan in a build's folder, or a new one, which is then kept there. Ray must run if one has to be made of
    examples that are not at hand.

    Args:
        on_counted: told how many more shards were counted.

    Raises:
        UserError: more examples are bad than `max_rejected` allows, or none is left, or the folder holds a memory
            built with other settings and `overwrite` is off.
    """
    if not len(build.examples):
        raise UserError(f"Split '{build.split}' has no examples to build a memory from.")
    if (plan := find_plan(build)) is None:
        plan = _count(build, on_counted)
        _check(build, plan)
        _keep(build, plan)
    else:
        _check(build, plan)
    return plan


def find_plan(build: MemoryBuild) -> Plan | None:
    """The plan of exactly this build, if its folder holds one.

    Raises:
        UserError: it holds another, and `overwrite` is off.
    """
    if not (build.folder / _PLAN).exists():
        return None
    key, kept = "unreadable", None
    try:
        kept = json.loads((build.folder / _PLAN).read_text())
        key = str(kept["plan_hash"])
        if key == build.plan_hash:
            rejected = _read_rejected(build.folder) if kept["rejected"] else []
            return Plan(tuple(kept["examples"]), tuple(kept["rows"]), kept["rejected"], tuple(rejected))
    except (OSError, ValueError, KeyError, TypeError):
        key = "unreadable"
    if build.config.overwrite:
        return None
    _refuse_other_plm(build)
    raise UserError(
        f"{build.folder}: holds a memory built from other examples or with other settings "
        f"(plan {key}, this run's is {build.plan_hash}). Choose another run_dir, or set build_memory.overwrite=true."
    )


def finished_shards(folder: Path) -> list[ShardInfo]:
    """Receipts of the shards that are there in full, in the order of the plan."""
    receipts = sorted(folder.glob("shard-*.receipt.json"))
    found = (read_receipt(receipt.with_name(f"{receipt.name.split('.')[0]}.parquet")) for receipt in receipts)
    return [info for info in found if info]


def receipt_path(shard: Path) -> Path:
    return shard.with_suffix(".receipt.json")


def read_receipt(shard: Path) -> ShardInfo | None:
    """The receipt of a finished shard whose file is there, in full."""
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


def _keep(build: MemoryBuild, plan: Plan) -> None:
    """Start the folder anew; the plan is written last."""
    if (build.folder / _PLAN).exists():
        shutil.rmtree(build.folder)
    build.folder.mkdir(parents=True, exist_ok=True)
    for path in (*build.folder.glob("shard-*"), *build.folder.glob(MANIFEST)):
        path.unlink()  # of a memory whose removal was cut off: it belongs to another plan
    if plan.rejected:
        with atomic_file(build.folder / REJECTED) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(one) for one in plan.first_rejected]), temporary)
    kept = {
        "plan_hash": build.plan_hash,
        "examples": plan.examples,
        "rows": plan.rows,
        "rejected": plan.rejected,
    }
    with atomic_file(build.folder / _PLAN) as temporary:
        temporary.write_text(json.dumps(kept) + "\n")


def _read_rejected(folder: Path) -> list[Rejected]:
    return [Rejected(**row) for row in pq.read_table(folder / REJECTED).to_pylist()]


def _refuse_other_plm(build: MemoryBuild) -> None:
    if (build.folder / MANIFEST).exists():
        manifest = Manifest.read(build.folder)
        if not manifest.belongs_to(build.card):
            raise FingerprintMismatch(f"The memory {build.folder}", manifest.plm_label, build.card.label)


# ── counting ────────────────────────────────────────────────────────────────


def _count(build: MemoryBuild, on_counted: OnCounted) -> Plan:
    examples, rows, rejected, first = [0] * build.shards, [0] * build.shards, 0, []
    for counted in _counted_shards(build):
        if counted["error"]:
            raise UserError(counted["error"])
        number = counted["shard"]
        examples[number], rows[number] = counted["examples"], counted["rows"]
        rejected += counted["bad"]
        first += [Rejected(**one) for one in json.loads(counted["rejected"])]
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
    counted = [count_shard(build, number) for number in batch["shard"].tolist()]
    return {name: [one[name] for one in counted] for name in counted[0]}


def count_shard(build: MemoryBuild, number: int) -> dict[str, Any]:
    """What a shard will hold: a row of Ray Data, with the first bad examples as JSON."""
    row = {"shard": number, "examples": 0, "rows": 0, "bad": 0, "rejected": "[]", "error": ""}
    try:
        shard, bad = build.shard(number, build.read(number))
    except UserError as refused:  # carried back as data: Ray would bury its one line in a traceback
        return {**row, "error": str(refused)}
    rows = 0
    for example in shard.examples:
        weights = (shard.weights or {}).get(example.example_id)
        rows += len(example.target) + build.eos_row if weights is None else sum(weight > 0 for weight in weights)
    kept = json.dumps([asdict(one) for one in bad[: build.config.max_rejected + 1]])
    return {**row, "examples": len(shard.examples), "rows": rows, "bad": len(bad), "rejected": kept}


def number_rows(numbers: Sequence[tuple[int, int]]) -> Any:
    """A Ray data set of (build, shard) numbers, in few enough blocks for any number of shards."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"build": build, "shard": shard} for build, shard in numbers]
    return ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS))
