"""Builds an external memory on Ray Data: one shard is one task, PLM actors do the work, the manifest comes last.

A finished shard leaves a receipt beside it; a build that was stopped skips the shards that have one.
Knows no owner: the PLM is handed in as a factory, called once in every actor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pema_ray.config import BuildMemoryConfig
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ContextSource, ModelCard
from pema_ray.memory.manifest import MANIFEST, Manifest, ShardInfo
from pema_ray.memory.plan import Context, Rejected, ShardPlan, count_duplicates, plan_hash, plan_shards, sort_out
from pema_ray.memory.rows import generated_rows_of_shard, rows_of_shard, weighted
from pema_ray.memory.shards import atomic_file, write_shard
from pema_ray.tasks import EncodedPair

_PLAN = "plan.json"
REJECTED = "rejected.parquet"


@dataclass(frozen=True)
class MemoryBuild:
    """One memory to be built: its folder, its examples (bad ones too), and what its manifest will say."""

    folder: Path
    examples: Sequence[EncodedPair]
    card: ModelCard
    task: str
    split: str
    config: BuildMemoryConfig
    shared_tokens: int = 0
    """How many tokens all prompts of the task begin with."""
    eos_row: bool = True
    """Each example ends with a row of EOS; off where examples are pieces of one text."""

    @cached_property
    def _sorted(self) -> tuple[list[EncodedPair], list[Rejected]]:
        return sort_out(self.examples, self.card.max_positions + (not self.eos_row))  # the last token is no input then

    @property
    def accepted(self) -> list[EncodedPair]:
        return self._sorted[0]

    @property
    def rejected(self) -> list[Rejected]:
        return self._sorted[1]

    @property
    def context(self) -> Context:
        """`test` is teacher-forced whatever the others are: a likelihood is one of the gold prefix."""
        return "teacher_forced" if self.split == "test" else self.config.context

    @cached_property
    def shards(self) -> list[ShardPlan]:
        """Who computes what, equal rows counted out where that is asked for."""
        weights = None
        if self.config.deduplicate and self.split == "train":
            weights = count_duplicates(self.accepted, self.card.eos_token_ids[0], self.context)
        return plan_shards(
            self.accepted, self.config.examples_per_shard, self.context, weights, self.prompt_from, self.eos_row
        )

    @property
    def prompt_from(self) -> int | None:
        """The first token of prompts that has a row, where prompts have any."""
        return self.shared_tokens if self.config.prompts else None

    def hash(self) -> str:
        settings: dict[str, object] = {
            "fingerprint": self.card.fingerprint,
            "key_dtype": self.config.key_dtype,
            "examples_per_shard": self.config.examples_per_shard,
            "max_batch_tokens": self.config.max_batch_tokens,
            "context": self.context,
        }
        if self.context == "generated":
            settings["sequences"] = self.config.sequences
        if self.config.deduplicate and self.split == "train":
            settings["deduplicate"] = True
        if self.config.prompts:
            settings["prompt_from"] = self.shared_tokens
        if not self.eos_row:
            settings["eos_row"] = False
        return plan_hash(self.accepted, settings)

    def check(self) -> None:
        """Refuse more bad examples than `max_rejected`, before anything is computed."""
        if not self.examples:
            raise UserError(f"Split '{self.split}' has no examples to build a memory from.")
        most = self.config.max_rejected
        if len(self.rejected) > most:
            first, others = self.rejected[0], len(self.rejected) - 1
            more = f" ({others:,} more are bad.)" if others else ""
            raise UserError(
                f"Split '{self.split}', example {first.example_id}: {first.reason}.{more} "
                f"Shorten or remove them, or set build_memory.max_rejected={len(self.rejected)} to have them set aside."
            )
        if not self.accepted:
            raise UserError(f"Split '{self.split}': all {len(self.examples):,} examples are bad.")


def prepare_folder(build: MemoryBuild) -> tuple[list[ShardPlan], list[ShardInfo]]:
    """Make the folder ready and say what is left: `(shards to do, receipts of finished ones)`.

    Raises:
        UserError: the folder holds a memory built with other settings and `overwrite` is off.
    """
    folder, key = build.folder, build.hash()
    if (folder / _PLAN).exists():
        found = _found_plan(folder)
        if found != key and build.config.overwrite:
            shutil.rmtree(folder)
        elif found != key:
            _refuse_other_plm(build)
            raise UserError(
                f"{folder}: holds a memory built from other examples or with other settings "
                f"(plan {found}, this run's is {key}). Choose another run_dir, or set build_memory.overwrite=true."
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _PLAN).exists():
        with atomic_file(folder / _PLAN) as temporary:
            temporary.write_text(json.dumps({"plan_hash": key}) + "\n")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    todo, done = [], []
    for shard in build.shards:
        receipt = _read_receipt(folder / shard.name)
        done.append(receipt) if receipt else todo.append(shard)
    return todo, done


def _refuse_other_plm(build: MemoryBuild) -> None:
    if (build.folder / MANIFEST).exists():
        manifest = Manifest.read(build.folder)
        if not manifest.belongs_to(build.card):
            raise FingerprintMismatch(f"The memory {build.folder}", manifest.plm_label, build.card.label)


def _found_plan(folder: Path) -> str:
    try:
        return str(json.loads((folder / _PLAN).read_text())["plan_hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def run_build(
    build: MemoryBuild, source_factory: Callable[[], ContextSource], on_shard: Callable[[ShardInfo], None] | None = None
) -> Manifest:
    """`run_builds` of a single memory."""
    return run_builds([build], source_factory, on_shard)[0]


def run_builds(
    builds: Sequence[MemoryBuild],
    source_factory: Callable[[], ContextSource],
    on_shard: Callable[[ShardInfo], None] | None = None,
) -> list[Manifest]:
    """Compute what is missing of every memory, with one set of actors, and write the manifests.

    Ray must be running if anything is missing. The builds share their settings and their PLM.

    Args:
        source_factory: makes the PLM's extractor inside an actor; must be picklable.
        on_shard: called with each shard as it is finished.
    """
    todo: list[tuple[Path, ShardPlan]] = []
    done: dict[Path, list[ShardInfo]] = {}
    for build in builds:
        build.check()
    for build in builds:
        missing, done[build.folder] = prepare_folder(build)
        todo += [(build.folder, shard) for shard in missing]
    if todo:
        for folder, info in _compute(builds[0], todo, source_factory):
            done[folder].append(info)
            if on_shard:
                on_shard(info)
    for build in builds:
        _write_rejected(build)
    return [_write_manifest(build, done[build.folder]) for build in builds]


def _write_rejected(build: MemoryBuild) -> None:
    """`rejected.parquet`: the examples that were set aside, and why; no file without any."""
    if build.rejected:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_file(build.folder / REJECTED) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(one) for one in build.rejected]), temporary)


def _write_manifest(build: MemoryBuild, done: Sequence[ShardInfo]) -> Manifest:
    done = [info for info in done if info.rows]  # counted out to the last row: the PLM ended before any that is new
    manifest = Manifest(
        plm_name=build.card.name,
        fingerprint=build.card.fingerprint,
        hidden_size=build.card.hidden_size,
        vocab_size=build.card.vocab_size,
        eos_token_id=build.card.eos_token_ids[0],
        task=build.task,
        split=build.split,
        context=build.context,
        key_dtype=build.config.key_dtype,
        plan_hash=build.hash(),
        prompt_from=build.prompt_from,
        rows=sum(info.rows for info in done),
        examples=sum(info.examples for info in done),
        rejected=len(build.rejected),
        shards=tuple(sorted(done, key=lambda info: info.name)),
    )
    manifest.save(build.folder)
    return manifest


def stream_shards(build: MemoryBuild, factory: Callable[[], ContextSource]) -> Any:
    """A lazy Ray data set that builds a memory as it is read: one row a shard, in the order of the plan.

    A row holds `info`, the receipt of a shard that is now on disk, or `error`, what was refused. Finished shards
    pass through at once. `run_build` then makes what was not read, and writes the manifest.
    """
    import ray.data

    build.check()
    prepare_folder(build)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return _dataset(build, [(build.folder, shard) for shard in build.shards], factory)


def planned_rows(build: MemoryBuild) -> int:
    """How many rows a teacher-forced memory will have."""
    found = 0
    for shard in build.shards:
        weights = shard.weights or {}
        for example in shard.examples:
            counts = weights.get(example.example_id)
            found += len(example.target) + build.eos_row if counts is None else sum(count > 0 for count in counts)
    return found


def finished_shards(folder: Path) -> list[ShardInfo]:
    """Receipts of the shards that are there in full, in the order of the plan."""
    receipts = sorted(folder.glob("shard-*.receipt.json"))
    found = (_read_receipt(receipt.with_name(f"{receipt.name.split('.')[0]}.parquet")) for receipt in receipts)
    return [info for info in found if info]


def _compute(
    build: MemoryBuild, todo: Sequence[tuple[Path, ShardPlan]], factory: Callable[[], ContextSource]
) -> Iterator[tuple[Path, ShardInfo]]:
    for row in _dataset(build, todo, factory).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield todo[row["number"]][0], ShardInfo.model_validate_json(row["info"])


def _dataset(build: MemoryBuild, todo: Sequence[tuple[Path, ShardPlan]], factory: Callable[[], ContextSource]) -> Any:
    import ray
    import ray.data

    config = build.config
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Plans travel once, through the object store; Ray Data's rows are only their numbers.
    plans = ray.put([shard for _, shard in todo])
    numbers = ray.data.from_items([{"number": n} for n in range(len(todo))], override_num_blocks=len(todo))
    return numbers.map_batches(
        _ShardActor,
        fn_constructor_args=([folder for folder, _ in todo], plans, build.card.eos_token_ids, config, factory),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.actors, len(todo)), max_tasks_in_flight_per_actor=2),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )


class _ShardActor:
    """A PLM in a Ray Data actor: takes a shard plan, leaves a Parquet file and its receipt."""

    def __init__(
        self,
        folders: list[Path],
        plans: Any,
        eos: tuple[int, ...],
        config: BuildMemoryConfig,
        factory: Callable[[], ContextSource],
    ) -> None:
        import ray

        self.folders, self.eos, self.config = folders, eos, config
        self.plans: list[ShardPlan] = ray.get(plans) if isinstance(plans, ray.ObjectRef) else plans
        try:
            self.source, self.refusal = factory(), ""
        except UserError as error:  # told with the first shard, for the reason below
            self.source, self.refusal = None, str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,) = (int(n) for n in batch["number"])
        info, error = "", self.refusal
        if not error:
            try:
                folder, shard = self.folders[number], self.plans[number]
                info = (_read_receipt(folder / shard.name) or self._make(folder, shard)).model_dump_json()
            except UserError as refused:  # carried back as data: Ray would bury its one line in a traceback
                error = str(refused)
        return {"number": [number], "info": [info], "error": [error]}

    def _make(self, folder: Path, shard: ShardPlan) -> ShardInfo:
        config = self.config
        assert self.source is not None
        if shard.context == "generated":
            rows, tokens = generated_rows_of_shard(self.source, shard, self.eos, config.key_dtype, config.sequences)
            padded = tokens  # a session's own affair
        else:
            rows, tokens, padded = rows_of_shard(
                self.source, shard, self.eos[0], config.key_dtype, config.max_batch_tokens
            )
        if shard.weights is not None:
            rows = weighted(rows, shard.weights)
        path = folder / shard.name
        size, digest = write_shard(path, rows)
        info = ShardInfo(
            name=shard.name,
            rows=rows.target_rows,
            prompt_rows=len(rows) - rows.target_rows,
            represents=rows.represents,
            examples=len(np.unique(rows.example_id)),
            tokens=tokens,
            padded_tokens=padded,
            bytes=size,
            sha256=digest,
        )
        with atomic_file(_receipt(path)) as temporary:
            temporary.write_text(info.model_dump_json() + "\n")
        return info


def _receipt(shard: Path) -> Path:
    return shard.with_suffix(".receipt.json")


def _read_receipt(shard: Path) -> ShardInfo | None:
    """The receipt of a finished shard whose file is there, in full."""
    try:
        info = ShardInfo.model_validate_json(_receipt(shard).read_bytes())
        return info if shard.stat().st_size == info.bytes else None
    except (FileNotFoundError, ValidationError):
        return None
