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
from pema_ray.memory.shards import MemoryRows, save_shard
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.memory.waits import on_wait_of
from pema_ray.runtime.files import atomic_file
from pema_ray.tasks import EncodedPair

_CONCURRENT_SHARDS = 2  # of one actor: one is written while the next is computed
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
        except UserError as error:
            row["refusal"] = pickle.dumps(error)
        rows.append(row)
    return pa.Table.from_pylist(rows, _TOKENISED)


def examples_of(row: dict[str, Any]) -> list[EncodedPair]:
    """The examples in a row of `tokenise`."""
    return [EncodedPair(*parts) for parts in zip(row["example_id"], row["prompt"], row["target"], strict=True)]


class ShardWorker:
    """A client of the PLM in a Ray Data actor: computes a shard, writes its Parquet file and its receipt.

    All calls run on the actor's event loop. `requests_in_flight` limits the requests of all shards together, which
    are sent in the order of the shards; encoding and writing run in threads.
    """

    def __init__(self, builds: Any, factory: Callable[[], Extractor], board: Any = None) -> None:
        import ray

        self.builds: list[MemoryBuild] = ray.get(builds) if isinstance(builds, ray.ObjectRef) else builds
        self.config = self.builds[0].config
        self._window = asyncio.Semaphore(self.config.requests_in_flight)
        self._shard_slots = asyncio.Semaphore(_CONCURRENT_SHARDS)
        self._sessions = asyncio.Semaphore(1)  # one shard at a time uses all `sequences`
        self._plm: PatientPLM | None = None
        self._refusal: UserError | None = None
        try:
            client = cast(Any, factory())  # a plain extractor, if no build is of the generated context
            self._plm = PatientPLM(client, self.config.patience_seconds, on_wait_of(uuid.uuid4().hex, board))
        except UserError as error:  # returned with the first shard, for the reason below
            self._refusal = error

    async def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        (row,) = batch.to_pylist()
        build, number = self.builds[row["build"]], row["shard"]
        info, refusal = "", row.get("refusal") or (pickle.dumps(self._refusal) if self._refusal else b"")
        if not refusal:
            try:
                async with self._shard_slots:
                    info = (await self._shard(build, number, row)).model_dump_json()
            except UserError as error:  # returned as data: Ray would bury its one line in a traceback
                refusal = pickle.dumps(error)
        message = str(pickle.loads(refusal)) if refusal else ""
        result = {"build": row["build"], "shard": number, "info": info, "error": message, "refusal": refusal}
        return {name: [value] for name, value in result.items()} | {"node": [socket.gethostname()]}

    async def _shard(self, build: MemoryBuild, number: int, row: dict[str, Any]) -> ShardInfo:
        path = build.folder / shard_name(number)
        if receipt := read_receipt(path):
            return receipt
        examples = examples_of(row) if "prompt" in row else await asyncio.to_thread(build.read, number)
        shard, _ = build.shard(number, examples)
        config, eos, plm = self.config, build.eos_token_ids, self._plm
        assert plm is not None
        if shard.context == "generated":
            async with self._sessions:
                rows, tokens = await generated_rows_of_shard(plm, shard, eos, config.key_dtype, config.sequences)
            padded = tokens  # only the PLM owner knows its padding
        else:
            rows, tokens, padded = await rows_of_shard(
                plm, shard, eos[0], config.key_dtype, config.max_batch_tokens, self._window
            )
        return await asyncio.to_thread(_write, path, shard, rows, tokens, padded)


def _write(path: Path, shard: ShardPlan, rows: MemoryRows, tokens: int, padded: int) -> ShardInfo:
    """Write the shard's file and then its receipt; both are on disk when this returns."""
    if shard.weights is not None:
        rows = weighted(rows, shard.weights)
    info = save_shard(path, rows, len(np.unique(rows.example_id)), tokens, padded)
    with atomic_file(receipt_path(path)) as temporary:
        temporary.write_text(info.model_dump_json() + "\n")
    return info
