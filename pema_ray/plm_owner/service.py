"""A replica of the PLM owner under Ray Serve: an engine, and everything that crosses the line as bytes.

Whoever calls it is trusted: inside one cluster the data owner's deployment, across organisations `api.py`, which has
checked keys and quotas before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from pema_ray.config import PLMConfig, Section
from pema_ray.errors import UserError
from pema_ray.hardware import DTYPES
from pema_ray.line import ExtractBatch, codec
from pema_ray.line.stepping import Stepped
from pema_ray.metrics import RayMetrics
from pema_ray.plm_owner.engine import Batcher, BatchSettings, Engine
from pema_ray.plm_owner.in_process import InProcessPLM
from pema_ray.plm_owner.load import load_plm
from pema_ray.plm_owner.off_loop import off_loop


class EngineConfig(Section):
    """How a replica of the PLM owner decodes."""

    slots: int = Field(default=32, ge=1)
    """Sessions held at the same time; more wait, and are told to come again when none becomes free."""
    max_tokens: int | None = Field(default=4096, ge=2)
    """Longest text of a session; none: what the PLM allows. `slots` times this bounds the cache."""
    prefill_tokens: int = Field(default=512, ge=1)
    """Positions of one pass over prompts; smaller ones hold up less those who wait for a token."""
    extract_tokens: int = Field(default=4096, ge=1)
    """Positions, padding included, of one pass of `extract`; larger batches are cut, and sessions go on between."""
    idle_seconds: float = Field(default=30.0, ge=0)
    """A session that is not heard of for so long may lose its slot to another."""
    forget_seconds: float = Field(default=600.0, gt=0)
    """A session that is not heard of for so long is forgotten, whether or not its slot is needed."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """A step that has not begun after so long is told to come again."""
    wire_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """`bfloat16` or `float16` halves the bytes of representations; none keeps the PLM's own."""


class PLMEngine:
    """The deployment's class; `serving.plm_engine` makes the deployment.

    Args:
        plm, engine: settings, as `PLMConfig` and `EngineConfig` take them.
    """

    def __init__(self, plm: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> None:
        self._plm_config, self.config = PLMConfig(**(plm or {})), EngineConfig(**(engine or {}))
        self._starting: asyncio.Task[Engine] | None = None
        self._source: InProcessPLM
        self._head_frame: bytes | None = None
        self._sampling: asyncio.Task[None] | None = None
        self._extracted_for = ""
        self._dtype = None if self.config.wire_dtype is None else DTYPES[self.config.wire_dtype]
        try:
            from ray import serve

            self.replica = serve.get_replica_context().replica_id.unique_id
        except Exception:  # local testing has no replica
            self.replica = "local"

    async def _engine(self) -> Engine:
        if self._starting is None:
            self._starting = asyncio.create_task(Engine(self._load).start())
        return await asyncio.shield(self._starting)

    def _load(self) -> Batcher:
        loaded = load_plm(self._plm_config)
        self._source = InProcessPLM(loaded)
        c = self.config
        settings = BatchSettings(c.slots, c.max_tokens, c.prefill_tokens, c.idle_seconds, c.forget_seconds)
        return Batcher(loaded, self._source.lm_head().head, settings)

    async def describe(self) -> dict[str, Any]:
        """The model card, and the longest text of a session."""
        engine = await self._engine()
        return {**self._source.describe().to_dict(), "max_session_tokens": engine.batcher.max_tokens}

    async def lm_head(self) -> bytes:
        """The LM-head bundle's files, as a frame."""
        engine = await self._engine()
        return await engine.call(self._framed_head)

    def _framed_head(self) -> bytes:
        """Made once: in the engine's one thread, where nobody comes between."""
        if self._head_frame is None:
            self._head_frame = codec.encode_files(self._source.lm_head().to_files())
        return self._head_frame

    async def step(self, owner: str, body: bytes) -> tuple[str, bytes]:
        """Steps of sessions, frame in and frame out; with it the name of the replica that holds them now.

        Raises:
            BadFrame: the bytes are no steps.
        """
        engine = await self._engine()
        steps = await off_loop(len(body), codec.decode_steps, body)
        try:
            outcomes = await engine.step(owner, steps, self.config.timeout_seconds)
            size = sum(outcome.state_NH.nbytes for outcome in outcomes if isinstance(outcome, Stepped))
            return self.replica, await off_loop(size, self._encoded, outcomes)
        except asyncio.CancelledError:  # whoever asked has gone away, and will never know what was opened here
            await engine.close(owner, [step.session for step in steps if not step.position])
            raise

    def _encoded(self, outcomes: Sequence[Stepped | Exception]) -> bytes:
        return codec.encode_stepped([self._sent(outcome) for outcome in outcomes])

    def _sent(self, outcome: Any) -> Any:
        if self._dtype is None or isinstance(outcome, Exception):
            return outcome
        return replace(outcome, state_NH=outcome.state_NH.to(self._dtype))

    async def extract(self, owner: str, body: bytes) -> bytes:
        """Representations of a batch, frame in and frame out.

        Raises:
            BadFrame: the bytes are no batch; UserError: a sequence is too long.
        """
        engine, batch = await self._engine(), await off_loop(len(body), codec.decode_extract, body)
        longest = max(map(len, batch.token_ids))
        if longest > engine.batcher.max_tokens:
            name = self._source.describe().name
            most = engine.batcher.max_tokens
            raise UserError(f"A text of {longest} tokens is longer than {name} takes here ({most}).")
        rows = []
        for piece in _pieces(batch, self.config.extract_tokens):
            rows.append(await engine.call(partial(self._extract, owner, piece)))
        return await off_loop(sum(piece.nbytes for piece in rows), self._joined, rows)

    def _joined(self, rows: Sequence[torch.Tensor]) -> bytes:
        whole = torch.cat(list(rows))
        return codec.encode_rows(whole if self._dtype is None else whole.to(self._dtype))

    def _extract(self, owner: str, piece: ExtractBatch) -> torch.Tensor:
        if owner != self._extracted_for:  # what one data owner's texts begin with is no other's business
            self._source.forget_prefix()
            self._extracted_for = owner
        return self._source.extract(piece)

    async def close(self, owner: str, sessions: Sequence[str]) -> None:
        """Forget sessions."""
        engine = await self._engine()
        await engine.close(owner, sessions)

    async def state(self) -> dict[str, Any]:
        """How busy this replica is."""
        return {"replica": self.replica, **self._levels(await self._engine())}

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            RuntimeError: the engine has failed; Serve then replaces the replica.
        """
        if self._starting is None or not self._starting.done():
            return
        if self._starting.exception() is not None or not self._starting.result().healthy:
            raise RuntimeError("the engine has failed")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Live sessions, for autoscaling: between two steps of a session nothing is going on that Serve could count."""
        if self._starting is None or not self._starting.done() or self._starting.exception() is not None:
            return {"live_sessions": 0.0}
        batcher = self._starting.result().batcher
        return {"live_sessions": float(batcher.sessions_heard_of(self.config.idle_seconds) + batcher.waiting)}

    async def reconfigure(self, _: Any) -> None:
        """Called by Ray Serve before the replica is used: the PLM is loaded by then, or Serve is told why not."""
        engine = await self._engine()
        if self._sampling is None:
            engine.metrics = metrics = RayMetrics("plm_owner")
            self._sampling = asyncio.create_task(metrics.keep_sampling(lambda: (engine.counts, self._levels(engine))))

    def _levels(self, engine: Engine) -> dict[str, float]:
        batcher = engine.batcher
        return {
            "live_sessions": batcher.live_sessions,
            "waiting_steps": batcher.waiting,
            "cached_tokens": batcher.cached_tokens,
            "slots": self.config.slots,
        }


def _pieces(batch: ExtractBatch, most: int) -> Iterator[ExtractBatch]:
    """The batch in its order, cut so that no piece is padded to more than so many positions, or has one sequence."""
    begin, longest = 0, 0
    for end, ids in enumerate(batch.token_ids):
        longest = max(longest, len(ids))
        if end > begin and (end + 1 - begin) * longest > most:
            yield ExtractBatch(batch.token_ids[begin:end], batch.first[begin:end])
            begin, longest = end, len(ids)
    yield ExtractBatch(batch.token_ids[begin:], batch.first[begin:])
