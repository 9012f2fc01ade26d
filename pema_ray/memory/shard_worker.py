"""The two steps of the build's pipeline: `tokenise`, a task, and `ShardWorker`, an actor with a client of the PLM."""

from __future__ import annotations

import asyncio
import pickle
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pema_ray.errors import UserError
from pema_ray.line.retry import PatientPLM
from pema_ray.memory.manifest import ShardInfo
from pema_ray.memory.plan import ShardPlan
from pema_ray.memory.planning import read_receipt, receipt_path
from pema_ray.memory.rows import Extractor, generated_rows_of_shard, rows_of_shard, weighted
from pema_ray.memory.shards import MemoryRows, write_shard
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.memory.waits import teller
from pema_ray.runtime.files import atomic_file
from pema_ray.tasks import EncodedPair

_SHARDS_AT_ONCE = 2  # of one actor: one is written while the next is computed
_TOKENS = pa.list_(pa.list_(pa.int32()))
_TOKENISED = pa.schema(
    {
        "build": pa.int64(),
        "shard": pa.int64(),
        "example_id": pa.list_(pa.int64()),
        "prompt": _TOKENS,
        "target": _TOKENS,
        "refusal": pa.binary(),
    }
)


def tokenise(batch: dict[str, Any], builds: Sequence[MemoryBuild]) -> pa.Table:
    """Read and tokenise the examples of shards: one row a shard."""
    rows = []
    for build, shard in zip(batch["build"].tolist(), batch["shard"].tolist()):
        row: dict[str, Any] = {"build": build, "shard": shard, "example_id": [], "prompt": [], "target": []}
        try:
            for example in builds[build].read(shard):
                row["example_id"].append(example.example_id)
                row["prompt"].append(example.prompt)
                row["target"].append(example.target)
            row["refusal"] = b""
        except UserError as refused:
            row["refusal"] = pickle.dumps(refused)
        rows.append(row)
    return pa.Table.from_pylist(rows, _TOKENISED)


def examples_of(row: dict[str, Any]) -> list[EncodedPair]:
    """What `tokenise` put into a row."""
    return [EncodedPair(*parts) for parts in zip(row["example_id"], row["prompt"], row["target"], strict=True)]


class ShardWorker:
    """A client of the PLM in a Ray Data actor: takes a shard, leaves a Parquet file and its receipt.

    All calls run on the actor's event loop. `requests_in_flight` bounds the requests of all shards together, which
    are sent in the order of the shards; encoding and writing run in threads beside them.
    """

    def __init__(self, builds: Any, factory: Callable[[], Extractor], board: Any = None) -> None:
        import ray

        self.builds: list[MemoryBuild] = ray.get(builds) if isinstance(builds, ray.ObjectRef) else builds
        self.config = self.builds[0].config
        self._window = asyncio.Semaphore(self.config.requests_in_flight)
        self._room = asyncio.Semaphore(_SHARDS_AT_ONCE)
        self._sessions = asyncio.Semaphore(1)  # `sequences` are those of one shard
        self._plm: PatientPLM | None = None
        self._refusal: UserError | None = None
        try:
            client = cast(Any, factory())  # a plain extractor, where no build is of the generated context
            self._plm = PatientPLM(client, self.config.patience_seconds, teller(board, uuid.uuid4().hex))
        except UserError as error:  # told with the first shard, for the reason below
            self._refusal = error

    async def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        (row,) = batch.to_pylist()
        build, number = self.builds[row["build"]], row["shard"]
        info, refusal = "", row.get("refusal") or (pickle.dumps(self._refusal) if self._refusal else b"")
        if not refusal:
            try:
                async with self._room:
                    info = (await self._shard(build, number, row)).model_dump_json()
            except UserError as refused:  # carried back as data: Ray would bury its one line in a traceback
                refusal = pickle.dumps(refused)
        error = str(pickle.loads(refusal)) if refusal else ""
        told = {"build": row["build"], "shard": number, "info": info, "error": error, "refusal": refusal}
        return {name: [value] for name, value in told.items()} | {"node": [socket.gethostname()]}

    async def _shard(self, build: MemoryBuild, number: int, row: dict[str, Any]) -> ShardInfo:
        path = build.folder / shard_name(number)
        if receipt := read_receipt(path):
            return receipt
        examples = examples_of(row) if "prompt" in row else await asyncio.to_thread(build.read, number)
        shard, _ = build.shard(number, examples)
        return await self._make(path, shard, build)

    async def _make(self, path: Path, shard: ShardPlan, build: MemoryBuild) -> ShardInfo:
        config, eos, plm = self.config, build.eos_token_ids, self._plm
        assert plm is not None
        if shard.context == "generated":
            async with self._sessions:
                rows, tokens = await generated_rows_of_shard(plm, shard, eos, config.key_dtype, config.sequences)
            padded = tokens  # the PLM owner's own affair
        else:
            rows, tokens, padded = await rows_of_shard(
                plm, shard, eos[0], config.key_dtype, config.max_batch_tokens, self._window
            )
        return await asyncio.to_thread(_write, path, shard, rows, tokens, padded)


def _write(path: Path, shard: ShardPlan, rows: MemoryRows, tokens: int, padded: int) -> ShardInfo:
    """The shard's file and then its receipt, both on disk before this returns."""
    if shard.weights is not None:
        rows = weighted(rows, shard.weights)
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
    with atomic_file(receipt_path(path)) as temporary:
        temporary.write_text(info.model_dump_json() + "\n")
    return info
