"""The decoder's requests and answers: sampling parameters, tokens, and which distribution chose them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule

Finish = Literal["eos", "stop", "length"]


class GenerationAborted(Exception):
    """An answer that could not be finished: the PLM owner is busy, gone or another one, or the service ends."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the mixture."""

    kind: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 4
    length_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to generate.

    Attributes:
        prompt: token ids.
        adapter: its name; None answers with the PLM alone.
        length: steps over which a falling λ reaches its floor.
        stop: strings that end an answer and are not part of it; white space before the first word never does.
        eos: tokens that end the answer beside the PLM's own, such as the end of a chat's turn.
        top: number of most probable tokens to return with every token.
        explain: return an `Attribution` with every token.
        draft: maximum draft tokens per step; 0 drafts none. Drafts never change an answer.
        stream: with the seed, names the random draws of this answer, so that they do not depend on other requests.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    schedule: UnrollingSchedule
    adapter: str | None = None
    length: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()
    top: int = 0
    explain: bool = False
    draft: int = 0
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Attribution:
    """Which distribution chose a token.

    Attributes:
        lam: weight of the data owner's distribution; a predicted λ and neighbours are part of it.
        log_pema, log_plm: log-probability of the token under the data owner's distribution and under the PLM's.
        top_pema, top_plm: most probable tokens of each, as many as the request's `top`.
    """

    lam: float
    log_pema: float
    log_plm: float
    top_pema: list[tuple[int, float]] = field(default_factory=list)
    top_plm: list[tuple[int, float]] = field(default_factory=list)

    @property
    def decided_by(self) -> Literal["pema", "plm"]:
        """The distribution with the larger share of the mixture."""
        pema = self.lam * math.exp(self.log_pema)
        return "pema" if pema >= (1 - self.lam) * math.exp(self.log_plm) else "plm"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    Attributes:
        text: text that has become certain, not always this token's own.
        log_prob: under the mixture.
        finish: why the answer ends; on its last token only.
        top: most probable tokens and their log-probabilities.
    """

    id: int
    text: str
    log_prob: float
    finish: Finish | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    attribution: Attribution | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer.

    Attributes:
        tokens: all generated tokens, EOS included.
        text: without EOS and stop string.
    """

    tokens: list[Token]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def finish(self) -> Finish:
        finish = self.tokens[-1].finish
        assert finish is not None
        return finish

    @property
    def log_prob(self) -> float:
        """Of the whole answer under the mixture."""
        return sum(token.log_prob for token in self.tokens)
