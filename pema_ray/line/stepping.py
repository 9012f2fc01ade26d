"""Sessions of single sequences, step by step: what a data owner says while it decodes, and what it hears.

A session *is* its token ids. Whatever a PLM owner keeps of it is only a cache: a step says where it stands, so saying
it twice changes nothing, and who has lost a session is told all its ids again. H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pema_ray.line.messages import ModelCard

LONGEST_NAME = 200  # characters of a session's name


class Busy(Exception):
    """The PLM owner has no room for this now.

    Attributes:
        retry_after: seconds after which it may have.
    """

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Step:
    """The next tokens of one session.

    Attributes:
        session: a name chosen by the data owner; position 0 opens it.
        position: tokens of the session that come before these; later ones it may have are taken back.
        tokens: at least one.
        states: how many of the last tokens' representations are wanted, at least one.
        draft: let the PLM go on greedily by so many tokens after these; their representations come too.

    Raises:
        ValueError: a number that is out of range.
    """

    session: str
    position: int
    tokens: Sequence[int]
    states: int = 1
    draft: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.session) <= LONGEST_NAME:
            raise ValueError(f"a session needs a name of at most {LONGEST_NAME} characters")
        if self.position < 0 or self.draft < 0:
            raise ValueError(f"position {self.position} and draft {self.draft} must not be negative")
        if not 1 <= self.states <= len(self.tokens):
            raise ValueError(f"{self.states} states of {len(self.tokens)} tokens are asked for")


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step gave.

    Attributes:
        state_NH: representations `[states + draft, H]` on the CPU, the newest last.
        drafted: the tokens that the PLM went on with.
    """

    state_NH: torch.Tensor
    drafted: tuple[int, ...] = ()


class Stepper(Protocol):
    """A PLM owner's sessions, as seen from the data owner's side of the line; many steps make one round trip."""

    async def describe(self) -> ModelCard:
        """Name, fingerprint and sizes of the PLM."""
        ...

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        """Take steps of different sessions together; what went wrong with one of them stands in its place.

        That is `SessionLost` (say all its ids again), `Busy`, or a `UserError`, such as for a text that is too long.
        """
        ...

    async def close(self, sessions: Sequence[str]) -> None:
        """Forget sessions; those that are gone already are no error."""
        ...
