"""An answer that is being generated: its request, its branches, and the queue that its tokens leave by."""

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
        predictor: the data owner's distribution; None answers with the PLM alone. It stays until the answer is done.
        branches: hypotheses that still grow.
        lookup, memory: where draft tokens come from.
        rng: this answer's random draws.
        timeout: seconds for the answer; in lockstep, for one step of it.
        deadline: on `time.monotonic`.
        waiting: branches whose step is under way.
        unopened: why one of its branches has no session, which the PLM owner could not open yet, or lost; other answers
            go on without this one.
        ended: sessions that are no longer needed.
        trips: round trips that serve this answer alone.
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
    waiting: int = 0
    unopened: Exception | None = None
    ended: list[str] = field(default_factory=list)
    out: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    trips: set[asyncio.Task[None]] = field(default_factory=set)
    gone: bool = False

    def start(self) -> None:
        """Its first step is about to be sent."""
        self.deadline = time.monotonic() + self.timeout

    @property
    def prompt_from(self) -> int | None:
        """The first position of the prompt whose representation is needed, if any before the last."""
        return self.predictor.prompt_from if self.predictor is not None and self.predictor.looks_back else None

    @property
    def holds_slots(self) -> bool:
        """Whether the PLM owner holds a session of it."""
        return any(branch.sent for branch in self.branches)

    @property
    def width(self) -> int:
        """Sessions that it takes."""
        return self.request.sampling.beams if self.beams is not None else 1
