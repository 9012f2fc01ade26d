"""A fake PLM by arithmetic, with injected faults, and builds over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory, Manifest, MemoryRows
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.planning import prepare_folder
from pema_ray.memory.shard_worker import ShardWorker
from pema_ray.memory.shards import save_shard
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.tasks import EncodedPair

CARD = ModelCard("counting", "c" * 16, 2, 300, 96, (1,))
EXAMPLES = [EncodedPair(i * 3, [10, 20, 30 + i], [4 + j for j in range(1 + i % 4)]) for i in range(10)]
SETTINGS: dict[str, Any] = {"examples_per_shard": 2, "cpus_per_actor": 0.5, "max_batch_tokens": 16}


def build(
    folder: Path, examples: Sequence[EncodedPair] = tuple(EXAMPLES), split: str = "train", **changes
) -> MemoryBuild:
    config = BuildMemoryConfig(**{**SETTINGS, **changes})
    return MemoryBuild(folder, ListedExamples(examples), CARD, "task", split, config, shared_tokens=1)


def fake_plm(
    faults: Path | None = None, fail_on: int | None = None, refuse: str = "", seconds: float = 0.0
) -> Callable:
    """Makes a `PLMClient` whose representation at a position is (sum of the ids so far, position); a closure, so that
    it travels to an actor by value.

    Args:
        faults: a folder of faults. `revoked` and `other` last as long as they lie there; each file named `busy…`
            (its text: seconds to wait), `gone…` or `lost…` strikes once.
        fail_on: a token that is refused.
        refuse: why no client can be made.
        seconds: that each extraction takes.
    """

    def make():
        import asyncio

        import torch

        from pema_ray.errors import FingerprintMismatch, UserError
        from pema_ray.line import Busy, Description, Limits, ModelCard, SessionLost, Stepped

        def strikes(kind: str) -> str | None:
            """Take a fault of this kind, if there is one, and return its text; each fault strikes once."""
            for path in sorted(faults.glob(f"{kind}*")) if faults else ():
                try:
                    text = path.read_text()
                    path.unlink()
                    return text or "0"
                except FileNotFoundError:
                    continue
            return None

        def check() -> None:
            if faults and (faults / "revoked").exists():
                raise UserError("https://plm.test: the key was revoked. Ask the PLM owner for a new one.")
            if faults and (faults / "other").exists():
                raise FingerprintMismatch("https://plm.test", "other (dddd)", "counting (cccc)")
            if (seconds := strikes("busy")) is not None:
                raise Busy("quota of 200000 rows a minute", float(seconds))
            if strikes("gone") is not None:
                raise ConnectionError("https://plm.test: connection refused")

        def states(ids, first):
            return torch.tensor([[float(sum(ids[: at + 1])), float(at)] for at in range(first, len(ids))])

        class Counting:
            def __init__(self):
                self.sessions, self.closed, self.messages = {}, [], []

            async def describe(self):
                card = ModelCard("counting", "c" * 16, 2, 300, 96, (1,))
                return Description(card, Limits(max_tokens=96, max_draft=5, max_steps=7))

            async def extract(self, batch):
                self.messages.append(batch)
                if any(fail_on in ids for ids in batch.token_ids):
                    raise UserError(f"token {fail_on} is not spoken here")
                await asyncio.sleep(seconds)
                check()
                pairs = zip(batch.token_ids, batch.first, strict=True)
                prefix = [*batch.prefix]
                return torch.cat([states([*prefix, *ids], len(prefix) + first) for ids, first in pairs])

            async def step(self, steps):
                self.messages.append(steps)
                check()
                return [self.answer(step) for step in steps]

            def answer(self, step):
                if strikes("lost") is not None:
                    self.sessions.pop(step.session, None)
                known_ids = [] if step.position == 0 else self.sessions.get(step.session)
                if known_ids is None or len(known_ids) < step.position:
                    return SessionLost()
                if strikes("step-busy") is not None:
                    return Busy("no free slot", 0.0)
                ids, drafted = [*known_ids[: step.position], *step.tokens], []
                first = len(ids) - step.states
                for _ in range(step.draft):
                    drafted.append(next_token([*ids, *drafted]))
                ids += drafted
                self.sessions[step.session] = ids
                return Stepped(states(ids, first), tuple(drafted))

            async def close(self, sessions):
                self.closed += sessions
                for session in sessions:
                    self.sessions.pop(session, None)

            async def end(self):
                pass

        def next_token(ids):
            return 1 if sum(ids) % 5 == 0 else 3 + (7 * sum(ids) + len(ids)) % 90

        if refuse:
            raise UserError(refuse)
        return Counting()

    return make


def next_token(ids: Sequence[int]) -> int:
    """The fake PLM's next token after these."""
    return 1 if sum(ids) % 5 == 0 else 3 + (7 * sum(ids) + len(ids)) % 90


def write_memory(folder: Path, shards: Sequence[MemoryRows], **changes: Any) -> ExternalMemory:
    """A finished memory of these rows, without a build; `changes` are fields of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = [
        save_shard(folder / shard_name(number), rows, len(np.unique(rows.example_id)))
        for number, rows in enumerate(shards)
    ]
    fields = {
        "plm_name": "tiny", "fingerprint": "a" * 16, "hidden_size": shards[0].key.shape[1], "vocab_size": 300,
        "eos_token_id": 1, "task": "t", "split": "train", "context": "teacher_forced",
        "key_dtype": shards[0].key.dtype, "plan_hash": "0" * 16, "rows": sum(info.rows for info in infos),
        "examples": sum(info.examples for info in infos), "shards": tuple(infos),
    }  # fmt: skip
    Manifest.model_validate(fields | changes).save(folder)
    return ExternalMemory.open(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def work(build: MemoryBuild, shards: Sequence[int], factory: Callable | None = None) -> list[str]:
    """What an actor does with shards, all at once and without Ray; the errors, "" where there was none."""

    async def calls() -> list[str]:
        worker = ShardWorker([build], factory or fake_plm())
        batches = [pa.Table.from_pylist([{"build": 0, "shard": number}]) for number in shards]
        rows = await asyncio.gather(*(worker(batch) for batch in batches))
        return [row["error"][0] for row in rows]

    return asyncio.run(calls())


def in_this_process(build: MemoryBuild, numbers: list[int] | None = None, factory: Callable | None = None) -> None:
    """What actors do, without Ray."""
    todo, _ = prepare_folder(build)
    assert set(work(build, [n for n in todo if numbers is None or n in numbers], factory)) <= {""}
