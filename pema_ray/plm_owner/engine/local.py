"""The PLM owner in this process: a `PLMClient` over an engine, without Serve. N rows, H hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, Description, ExtractBatch, Limits, LMHeadBundle, Step, Stepped
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.prefix import Prefix
from pema_ray.plm_owner.engine.batcher import Batcher
from pema_ray.plm_owner.engine.config import EngineConfig
from pema_ray.plm_owner.engine.engine import Engine
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm
from pema_ray.runtime.hardware import DTYPES


class LocalPLM:
    """A `PLMClient` over a PLM in this process; the first call loads it and starts its engine on the running loop.

    Args:
        plm: how to load it, or a loaded one.
        fingerprint: of the expected PLM; none accepts any.
        owner: whose sessions these are.

    Raises (every call):
        UserError: the PLM cannot be loaded or served.
        FingerprintMismatch: it is not the expected one.
    """

    def __init__(
        self,
        plm: PLMConfig | LoadedPLM,
        engine: EngineConfig | None = None,
        fingerprint: str | None = None,
        owner: str = "local",
    ) -> None:
        self._plm, self.config, self.owner, self._expected = plm, engine or EngineConfig(), owner, fingerprint
        self._starting: asyncio.Task[Engine] | None = None
        self._ended = False
        self._dtype = None if self.config.wire_dtype is None else DTYPES[self.config.wire_dtype]
        self._bundle: LMHeadBundle

    async def engine(self) -> Engine:
        """The engine, started."""
        if self._ended:
            raise UserError("This client of the PLM has ended; make a new one.")
        if self._starting is None:
            self._starting = asyncio.create_task(Engine(self._load).start())
        return await asyncio.shield(self._starting)

    @property
    def batcher(self) -> Batcher | None:
        """The engine's batcher, once it is loaded."""
        starting = self._starting
        done = starting is not None and starting.done() and not starting.cancelled() and starting.exception() is None
        return starting.result().batcher if starting is not None and done else None

    @property
    def healthy(self) -> bool:
        """Whether nothing has failed."""
        starting = self._starting
        if starting is None or not starting.done():
            return True
        return not starting.cancelled() and starting.exception() is None and starting.result().healthy

    def _load(self) -> Batcher:
        loaded = self._plm if isinstance(self._plm, LoadedPLM) else load_plm(self._plm)
        self._bundle = export_lm_head(loaded)
        self.check(self._expected)
        return Batcher(loaded, self._bundle.head, self.config)

    def check(self, fingerprint: str | None) -> None:
        """Check which PLM a request expects; none accepts any.

        Raises:
            FingerprintMismatch: another than the loaded one.
        """
        card = self._bundle.card
        if fingerprint is not None and fingerprint != card.fingerprint:
            label = self._plm.label if isinstance(self._plm, PLMConfig) else "The loaded PLM"
            raise FingerprintMismatch(label, card.label, fingerprint)

    async def describe(self) -> Description:
        engine = await self.engine()
        limits = Limits(max_tokens=engine.batcher.max_tokens, max_sessions=self.config.slots)
        shape = engine.batcher.prefixes.shape
        return Description(self._bundle.card, limits, shape, shape is not None and self.config.prefix_start == "kept")

    async def lm_head(self) -> LMHeadBundle:
        await self.engine()
        return self._bundle

    def sent(self, state_NH: torch.Tensor) -> torch.Tensor:
        """Representations in the type that crosses the line."""
        return state_NH if self._dtype is None else state_NH.to(self._dtype)

    def sent_outcome(self, outcome: Stepped | Exception) -> Stepped | Exception:
        """The same for the outcome of a step."""
        return replace(outcome, state_NH=self.sent(outcome.state_NH)) if isinstance(outcome, Stepped) else outcome

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        engine = await self.engine()
        with _failures_of(engine):
            return self.sent(await engine.extract(self.owner, batch, self.config.timeout_seconds))

    async def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        engine = await self.engine()
        with _failures_of(engine):
            return await engine.read_prefix(self.owner, token_ids, self.config.timeout_seconds)

    async def put_prefix(self, prefix: Prefix) -> None:
        engine = await self.engine()
        with _failures_of(engine):
            await engine.put_prefix(self.owner, prefix, self.config.timeout_seconds)

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        engine = await self.engine()
        with _failures_of(engine):
            d_prefix_nW = await engine.gradient(self.owner, batch, d_state_NH, self.config.timeout_seconds)
        return d_prefix_nW.to(d_state_NH.dtype)

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        engine = await self.engine()
        with _failures_of(engine):
            outcomes = await engine.step(self.owner, steps, self.config.timeout_seconds)
        return [self.sent_outcome(outcome) for outcome in outcomes]

    async def close(self, sessions: Sequence[str]) -> None:
        await (await self.engine()).close(self.owner, sessions)

    async def end(self) -> None:
        starting, self._ended = self._starting, True
        if starting is not None and not (await asyncio.wait([starting]))[0].pop().exception():
            await starting.result().stop()


@contextmanager
def _failures_of(engine: Engine) -> Iterator[None]:
    """Raise the cause if the engine has failed: no replica replaces it, so repeating does not help."""
    try:
        yield
    except Busy:
        if engine.healthy:
            raise
    if engine.failure is not None:
        raise RuntimeError(f"The PLM's engine has failed: {engine.failure}") from engine.failure
