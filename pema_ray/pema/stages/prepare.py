"""`pema-ray prepare`: read the task's pairs, check them, and write them as Parquet."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.run import Run
from pema_ray.runtime.files import atomic_file
from pema_ray.tasks import load_pairs
from pema_ray.tasks.sources import RejectedLine

_ROW_GROUP = 8192  # pairs; tasks read ranges of rows, by group


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `prepare/{train,dev,test}.parquet`."""
    run = Run(config)

    def work() -> dict[str, Any]:
        limit = config.task.max_rejected
        rejected: list[RejectedLine] | None = [] if limit else None
        pairs = load_pairs(run.task, config.task.files, config.task.limits, config.seed, rejected)
        if rejected and len(rejected) > limit:
            first = rejected[0]
            raise UserError(
                f"{first.file}: line {first.line}: {first.reason} In all, {len(rejected):,} lines are bad; "
                f"task.max_rejected allows {limit:,}."
            )
        if rejected:
            with atomic_file(run.path("prepare", "rejected.parquet")) as temporary:
                pq.write_table(pa.Table.from_pylist([asdict(line) for line in rejected]), temporary)
        for split, split_pairs in pairs.items():
            with atomic_file(run.path("prepare", f"{split}.parquet")) as temporary:
                table = pa.Table.from_pylist([asdict(pair) for pair in split_pairs])
                pq.write_table(table, temporary, row_group_size=_ROW_GROUP)
        counts = {split: len(split_pairs) for split, split_pairs in pairs.items()}
        return {
            "pairs": counts,
            "file_hashes": run.file_hashes,
            "rejected": len(rejected or ()),
            "summary": ", ".join(f"{count:,} {split}" for split, count in counts.items())
            + " pairs"
            + (f", {len(rejected):,} lines set aside" if rejected else ""),
        }

    return run.perform("prepare", work)
