"""A replica of the PLM owner under Ray Serve: frames of the line over a `LocalPLM`.

It trusts its callers: inside one cluster the data owner's deployment, across organisations `api.py`, which checks keys
and quotas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve

from pema_ray.line import Description, Stepped, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.engine import Engine, EngineConfig, LocalPLM
from pema_ray.plm_owner.service.executor import run_in_executor
from pema_ray.runtime.metrics import RayMetrics


class PLMEngine:
    """The deployment's class; `application.plm_owner` deploys it.

    Args:
        plm, engine: settings of `PLMConfig` and `EngineConfig`.

    Raises (every call with a fingerprint):
        FingerprintMismatch: another PLM is loaded.
    """

    def __init__(self, plm: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> None:
        self.config = EngineConfig(**(engine or {}))
        self.plm = LocalPLM(PLMConfig(**(plm or {})), self.config)
        self._head_frame: asyncio.Task[bytes] | None = None
        self._sampling: asyncio.Task[None] | None = None
        try:
            self.replica = serve.get_replica_context().replica_id.unique_id
        except Exception:  # local testing has no replica
            self.replica = "local"

    async def describe(self) -> Description:
        """The model card, and the longest sequence."""
        return await self.plm.describe()

    async def lm_head(self, fingerprint: str) -> bytes:
        """The LM-head bundle's files, as a frame made once."""
        bundle = await self.plm.lm_head()
        self.plm.check(fingerprint)
        if self._head_frame is None:
            self._head_frame = asyncio.create_task(asyncio.to_thread(lambda: codec.encode_files(bundle.to_files())))
        return await asyncio.shield(self._head_frame)

    async def step(self, owner: str, body: bytes) -> tuple[str, bytes]:
        """Steps of sessions, frame in and frame out, and the name of the replica that now holds them.

        Raises:
            BadFrame: the bytes are no steps.
        """
        engine = await self.plm.engine()
        steps, fingerprint = await run_in_executor(len(body), codec.decode_steps, body)
        self.plm.check(fingerprint)
        try:
            outcomes = await engine.step(owner, steps, self.config.timeout_seconds)
            size = sum(outcome.state_NH.nbytes for outcome in outcomes if isinstance(outcome, Stepped))
            return self.replica, await run_in_executor(size, self._encoded, outcomes)
        except asyncio.CancelledError:  # the caller will never learn which sessions were opened here
            await engine.close(owner, [step.session for step in steps if not step.position])
            raise

    def _encoded(self, outcomes: Sequence[Stepped | Exception]) -> bytes:
        return codec.encode_stepped([self.plm.sent_outcome(outcome) for outcome in outcomes])

    async def extract(self, owner: str, body: bytes) -> tuple[str, bytes]:
        """Representations of a batch, frame in and frame out, and the name of the replica that may keep their graph.

        Raises:
            BadFrame: the bytes are no batch.
            UserError: a sequence is too long, or holds a token that the PLM does not embed.
            Busy: the batch waited too long.
        """
        engine = await self.plm.engine()
        batch, fingerprint = await run_in_executor(len(body), codec.decode_extract, body)
        self.plm.check(fingerprint)
        rows = await engine.extract(owner, batch, self.config.timeout_seconds)
        return self.replica, await run_in_executor(rows.nbytes, lambda: codec.encode_rows(self.plm.sent(rows)))

    async def read_prefix(self, owner: str, body: bytes) -> bytes:
        """The keys and values of a text, frame in and frame out.

        Raises:
            BadFrame: the bytes are no text.
            UserError: this PLM takes no prefixes, or none so long.
            Busy: the text waited too long.
        """
        engine = await self.plm.engine()
        token_ids, fingerprint = await run_in_executor(len(body), codec.decode_text, body)
        self.plm.check(fingerprint)
        prefix = await engine.read_prefix(owner, token_ids, self.config.timeout_seconds)
        return await run_in_executor(prefix.embeddings.nbytes, codec.encode_prefix, prefix, fingerprint)

    async def put_prefix(self, owner: str, body: bytes) -> None:
        """Keep the prefix of a frame for this owner.

        Raises:
            BadFrame: the bytes are no prefix.
            UserError: this PLM takes none of this kind.
        """
        engine = await self.plm.engine()
        prefix, fingerprint = await run_in_executor(len(body), codec.decode_prefix, body)
        self.plm.check(fingerprint)
        await run_in_executor(prefix.embeddings.nbytes, lambda: prefix.handle)  # a hash, which the prefix keeps
        await engine.put_prefix(owner, prefix, self.config.timeout_seconds)

    async def gradient(self, owner: str, body: bytes) -> bytes:
        """The gradient of a batch's prefix, frame in and frame out.

        Raises:
            BadFrame: the bytes are no batch with gradients.
            UserError, Busy: as `extract`.
            PrefixLost: this replica does not hold the prefix.
        """
        engine = await self.plm.engine()
        batch, d_state_NH, fingerprint = await run_in_executor(len(body), codec.decode_gradient, body)
        self.plm.check(fingerprint)
        d_prefix_nW = await engine.gradient(owner, batch, d_state_NH, self.config.timeout_seconds)
        d_prefix_nW = d_prefix_nW.to(d_state_NH.dtype)
        return await run_in_executor(d_prefix_nW.nbytes, codec.encode_rows, d_prefix_nW)

    async def close(self, owner: str, sessions: Sequence[str]) -> None:
        """Forget sessions."""
        await (await self.plm.engine()).close(owner, sessions)

    async def state(self) -> dict[str, Any]:
        """The load of this replica."""
        return {"replica": self.replica, **self._levels(await self.plm.engine())}

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            RuntimeError: the engine has failed; Serve then replaces the replica.
        """
        if not self.plm.healthy:
            raise RuntimeError("the engine has failed")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Live sessions and waiting tokens, for autoscaling."""
        if (batcher := self.plm.batcher) is None:
            return {"live_sessions": 0.0, "waiting_tokens": 0.0}
        sessions = batcher.sessions_heard_of(self.config.idle_seconds) + batcher.waiting
        return {"live_sessions": float(sessions), "waiting_tokens": float(batcher.waiting_tokens)}

    async def reconfigure(self, _: Any) -> None:
        """Called by Ray Serve before the first request: loads the PLM, or raises why it cannot."""
        engine = await self.plm.engine()
        if self._sampling is None:
            engine.metrics = metrics = RayMetrics("plm_owner")
            self._sampling = asyncio.create_task(metrics.keep_sampling(lambda: (engine.counts, self._levels(engine))))

    def _levels(self, engine: Engine) -> dict[str, float]:
        batcher = engine.batcher
        return {
            "live_sessions": batcher.live_sessions,
            "waiting_steps": batcher.waiting,
            "waiting_tokens": batcher.waiting_tokens,
            "cached_tokens": batcher.cached_tokens,
            "slots": self.config.slots,
        }
