"""An answer that is being generated: its request, its branches, and the queue of its tokens."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

import torch

from pema_ray.data_owner.decoding.beam import BeamSearch
from pema_ray.data_owner.decoding.branch import Branch
from pema_ray.data_owner.decoding.drafts import MemoryLookup, PromptLookup
from pema_ray.data_owner.decoding.predictor import Predictor
from pema_ray.data_owner.decoding.request import GenerationRequest, Token


@dataclass(eq=False)
class Generation:
    """One answer.

    Attributes:
        predictor: the data owner's distribution; None answers with the PLM alone.
        branches: unfinished hypotheses.
        lookup, memory: sources of draft tokens.
        rng: this answer's random draws.
        timeout: seconds for the answer; in lockstep, for one step of it.
        deadline: on `time.monotonic`.
        in_flight: branches whose step is under way.
        unopened: why a branch has no session: the PLM owner could not open it yet, or lost it. Other answers do not
            wait for this one.
        ended: sessions to close.
        trips: round trips for this answer alone.
        closed: whether it is finished, or its caller has gone.
    """

    request: GenerationRequest
    predictor: Predictor | None
    branches: list[Branch]
    lookup: PromptLookup | None
    memory: MemoryLookup | None
    rng: torch.Generator
    timeout: float
    beams: BeamSearch | None = None
    deadline: float = math.inf
    in_flight: int = 0
    unopened: Exception | None = None
    ended: list[str] = field(default_factory=list)
    out: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    trips: set[asyncio.Task[None]] = field(default_factory=set)
    closed: bool = False

    def start(self) -> None:
        """Start the time limit."""
        self.deadline = time.monotonic() + self.timeout

    @property
    def prompt_from(self) -> int | None:
        """The first prompt position whose representation is needed; None: the last alone."""
        return self.predictor.prompt_from if self.predictor is not None and self.predictor.looks_back else None

    @property
    def holds_slots(self) -> bool:
        """Whether the PLM owner holds a session for it."""
        return any(branch.sent for branch in self.branches)

    @property
    def width(self) -> int:
        """Sessions that it needs."""
        return self.request.sampling.beams if self.beams is not None else 1
