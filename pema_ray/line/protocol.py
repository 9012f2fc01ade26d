"""The line protocol: everything a data owner may ask of a PLM owner. Symbols: N rows, H hidden size.

A session *is* its token ids; a PLM owner keeps only a cache of it. A step names its position, so repeating it changes
nothing; reopening a lost session with all its ids recovers it. Three classes implement `PLMClient`, interchangeably:
`plm_owner.engine.LocalPLM` (in this process), `plm_owner.service.replicas.Replicas` (a Serve handle) and
`data_owner.remote.RemotePLM` (HTTPS).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from pema_ray.errors import UserError
from pema_ray.line.lm_head import LMHeadBundle
from pema_ray.line.messages import ExtractBatch, ModelCard
from pema_ray.line.prefix import Prefix, PrefixShape

LONGEST_NAME = 200  # characters of a session's name
BACKWARD_TOKENS = 3  # that each token of a gradient counts as: a forward pass, and a backward pass of twice its work


class SessionLost(Exception):
    """The PLM owner does not hold this session: open it again with all its ids."""


class PrefixLost(Exception):
    """The PLM owner does not hold the prefix of this handle: put it again."""


class Busy(Exception):
    """The PLM owner has no capacity for this request now.

    Attributes:
        retry_after: seconds to wait before repeating it.
    """

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after

    def __reduce__(self):
        return Busy, (str(self), self.retry_after)


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest requests that a PLM owner accepts."""

    max_tokens: int
    """Tokens of one sequence or session."""
    max_draft: int = 2**31 - 1
    """Draft tokens of one step."""
    max_steps: int = 2**31 - 1
    """Steps in one message."""
    max_rows: int = 2**31 - 1
    """Representations in one answer."""
    max_sessions: int = 2**31 - 1
    """Sessions of one data owner at a time."""


@dataclass(frozen=True, slots=True)
class Description:
    """A PLM owner's model and limits."""

    card: ModelCard
    limits: Limits
    prefix_shape: PrefixShape | None = None
    """Of the prefixes that it takes; None: it takes none."""
    keeps_start: bool = False
    """Whether it computes no keys and values for others (`read_prefix`): prefixes are added to those of a text."""


@dataclass(frozen=True, slots=True)
class Step:
    """The next tokens of one session.

    Attributes:
        session: a name chosen by the data owner; position 0 opens it.
        position: tokens of the session before these; any later ones it holds are dropped.
        tokens: at least one.
        states: how many of the last tokens' representations to return, at least one.
        draft: tokens that the PLM appends greedily; their representations are returned too.
        waits: an opening waits for a free slot as long as the PLM owner allows; otherwise it is `Busy` after a moment,
            so that the other steps of its message do not wait and hold slots meanwhile. Openings of one message that
            wait go to one replica, in their order: send those of one answer together.
        handle: of an opening: the key-value prefix before the session's tokens; empty: none. Positions count tokens.

    Raises:
        ValueError: a number that is out of range.
    """

    session: str
    position: int
    tokens: Sequence[int]
    states: int = 1
    draft: int = 0
    waits: bool = True
    handle: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.session) <= LONGEST_NAME:
            raise ValueError(f"a session needs a name of at most {LONGEST_NAME} characters")
        if self.position < 0 or self.draft < 0:
            raise ValueError(f"position {self.position} and draft {self.draft} must not be negative")
        if not 1 <= self.states <= len(self.tokens):
            raise ValueError(f"a step of {len(self.tokens)} tokens cannot return {self.states} states")


@dataclass(frozen=True, slots=True)
class Stepped:
    """The result of a step.

    Attributes:
        state_NH: representations `[states + draft, H]` on the CPU, the newest last.
        drafted: the tokens that the PLM appended.
    """

    state_NH: torch.Tensor
    drafted: tuple[int, ...] = ()


class PLMClient(Protocol):
    """A PLM owner, as seen from the data owner's side of the line.

    Representations are the last hidden states *before* the final norm; `LMHead.norm` applies it. Every step and
    extraction carries the fingerprint of the PLM that `describe` named first.

    Raises (every call):
        FingerprintMismatch: another PLM has taken its place.
        UserError: only a person can fix it (key, certificate, a sequence that is too long).
        Busy: no capacity or over quota; repeat after `retry_after` seconds.
        ConnectionError: the PLM owner cannot be reached.
    """

    async def describe(self) -> Description:
        """Name, fingerprint, sizes and limits of the PLM."""
        ...

    async def lm_head(self) -> LMHeadBundle:
        """Final norm, LM head and tokenizer."""
        ...

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        """Representations `[N, H]` of the requested positions, sequence after sequence, on the CPU."""
        ...

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        """Advance different sessions together.

        The error of a single step stands in its place: `SessionLost`, `Busy` or `UserError`, such as for a sequence
        that is too long.
        """
        ...

    async def close(self, sessions: Sequence[str]) -> None:
        """Forget sessions; unknown names are no error."""
        ...

    async def end(self) -> None:
        """Release connections, threads and the model. The client cannot be used afterwards."""
        ...


@runtime_checkable
class AdaptablePLM(PLMClient, Protocol):
    """A PLM owner that also computes with a data owner's prefix, and the gradient of that prefix.

    Raises (where a handle is used):
        PrefixLost: put the prefix again.
    """

    async def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        """The keys and values of a text, from which a prefix may start."""
        ...

    async def put_prefix(self, prefix: Prefix) -> None:
        """Keep a prefix under its handle."""
        ...

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        """`Jᵀ D`, `[n, L · 2 · G · D]` in D's number format: the gradient of a loss with respect to the batch's prefix.

        Args:
            d_state_NH: D, the gradient of the loss with respect to the representations that `extract` returns.
        """
        ...


def adaptable(client: PLMClient) -> AdaptablePLM:
    """The client, where it has the calls for prefixes; whether its PLM owner takes any, `describe` tells.

    Raises:
        UserError: it has none.
    """
    if not isinstance(client, AdaptablePLM):
        raise UserError("A prefix cannot stand behind another: leave plm.prefix out.")
    return client


async def _together(calls: Iterable[Awaitable[torch.Tensor]]) -> list[torch.Tensor]:
    return list(await asyncio.gather(*calls))


class BlockingPLM:
    """A `PLMClient` for callers without an event loop; use it from one thread.

    Also a context manager, which ends the client.
    """

    def __init__(self, client: PLMClient) -> None:
        self.client = client
        self._runner = asyncio.Runner()

    def describe(self) -> Description:
        return self._runner.run(self.client.describe())

    def lm_head(self) -> LMHeadBundle:
        return self._runner.run(self.client.lm_head())

    def extract(self, batch: ExtractBatch) -> torch.Tensor:
        return self._runner.run(self.client.extract(batch))

    def extract_all(self, batches: Sequence[ExtractBatch]) -> list[torch.Tensor]:
        """Representations of several batches, requested together: replicas compute them side by side."""
        return self._runner.run(_together(self.client.extract(batch) for batch in batches))

    def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        return self._runner.run(self.client.step(steps))

    def close(self, sessions: Sequence[str]) -> None:
        self._runner.run(self.client.close(sessions))

    def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        return self._runner.run(self._adaptable.read_prefix(token_ids))

    def put_prefix(self, prefix: Prefix) -> None:
        self._runner.run(self._adaptable.put_prefix(prefix))

    def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        return self._runner.run(self._adaptable.gradient(batch, d_state_NH))

    def gradients(self, batches: Sequence[ExtractBatch], d_state_NH: torch.Tensor) -> list[torch.Tensor]:
        """Those of several batches, requested together, from the gradients of all their representations."""
        parts = d_state_NH.split([batch.rows for batch in batches])
        calls = zip(batches, parts, strict=True)
        return self._runner.run(_together(self._adaptable.gradient(batch, part) for batch, part in calls))

    @property
    def _adaptable(self) -> AdaptablePLM:
        return adaptable(self.client)

    def end(self) -> None:
        self._runner.run(self.client.end())
        self._runner.close()

    def __enter__(self) -> BlockingPLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
