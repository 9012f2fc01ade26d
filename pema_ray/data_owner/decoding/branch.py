"""One hypothesis of an answer, and the decoding session behind it. H hidden."""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass, field

import torch

from pema_ray.data_owner.decoding.draft_length import Draft
from pema_ray.data_owner.decoding.request import Token
from pema_ray.data_owner.decoding.state import DecodingState
from pema_ray.data_owner.decoding.text import AnswerText
from pema_ray.line import Step, Stepped


def _session_name() -> str:
    return uuid.uuid4().hex


@dataclass(eq=False)
class Branch:
    """Greedy and sampled answers have one branch, beam search has one for every beam.

    Attributes:
        ids: prompt and answer so far.
        sent: leading ids that the PLM owner's session holds.
        draft_tokens: sent with the next step, or drafted by the PLM owner.
        state_NH: received representations of the newest token and of the draft.
        decoding: state of an adapter that looks back; None until the prompt's representations arrive.
    """

    ids: list[int]
    prompt_length: int
    text: AnswerText
    session: str = field(default_factory=_session_name)
    sent: int = 0
    draft: Draft = field(default_factory=Draft)
    draft_tokens: list[int] = field(default_factory=list)
    state_NH: torch.Tensor | None = None
    decoding: DecodingState | None = None
    tokens: list[Token] = field(default_factory=list)
    log_prob: float = 0.0
    replays: int = 0

    @property
    def position(self) -> int:
        """Tokens answered so far: t of the schedule."""
        return len(self.ids) - self.prompt_length

    def next_step(self, prompt_from: int | None, waits: bool = True, prefix: str = "") -> Step:
        """What the PLM owner is to compute next.

        Args:
            prompt_from: request the prompt's representations too, from this position on.
            waits: whether to wait for a slot if this opens a session.
            prefix: the name of the adapter's own, which a `PrefixedPLM` puts before the session.
        """
        tokens = [*self.ids[self.sent :], *self.draft_tokens]
        states = 1 + len(self.draft_tokens)
        if prompt_from is not None and self.decoding is None:
            states = len(tokens) - min(prompt_from, len(tokens) - 1)
        return Step(self.session, self.sent, tokens, states, self.draft.by_plm, waits or self.sent > 0, prefix)

    def receive(self, stepped: Stepped) -> None:
        """The answer to `next_step`."""
        self.sent = len(self.ids)
        if stepped.drafted:
            self.draft_tokens = list(stepped.drafted)
        self.state_NH, self.replays = stepped.state_NH, 0

    def reopen(self) -> str:
        """Switch to a new session, which will receive all ids; returns the name of the lost one."""
        lost_session, self.session = self.session, _session_name()
        self.sent, self.draft_tokens, self.draft, self.state_NH = 0, [], Draft(), None
        return lost_session

    def take_over(self, ended: Branch) -> None:
        """Reuse the session of an ended hypothesis, from the first token that differs."""
        self.session = ended.session
        pairs = zip(self.ids, ended.ids[: ended.sent], strict=False)
        self.sent = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.ids) - 1, ended.sent))

    def append(self, token: Token) -> None:
        """Add a token whose representation has not arrived."""
        self.ids.append(token.id)
        self.tokens.append(token)
        self.log_prob += token.log_prob
        if self.decoding is not None:
            self.decoding.follow(token.id)

    def fork(self) -> Branch:
        """A copy in a session of its own."""
        fork = copy.copy(self)
        fork.ids, fork.tokens, fork.text = list(self.ids), list(self.tokens), self.text.fork()
        fork.decoding = None if self.decoding is None else self.decoding.fork()
        fork.session, fork.sent, fork.draft_tokens = _session_name(), 0, []
        return fork
