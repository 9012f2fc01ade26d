"""What is asked of an `Unroller` and what it tells: orders, and tokens with who decided them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pema_ray.data_owner.generation import Decoding
from pema_ray.data_owner.unrolling import UnrollingSchedule


class GivenUp(Exception):
    """An answer that could not be finished in time: the PLM owner is busy or gone."""


@dataclass(frozen=True, slots=True)
class Order:
    """One answer that is wanted.

    Attributes:
        adapter: its name; none answers with the PLM alone.
        length: steps that a falling λ is stretched over.
        top: so many most probable tokens are told with every token.
        explain: tell λ, both distributions' probabilities and their most probable tokens.
        draft: most tokens guessed ahead; 0 guesses none.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    schedule: UnrollingSchedule
    adapter: str | None = None
    length: int = 1
    decoding: Decoding = field(default_factory=Decoding)
    stop: tuple[str, ...] = ()
    top: int = 0
    explain: bool = False
    draft: int = 4
    seed_stream: int = 0


@dataclass(frozen=True, slots=True)
class Explained:
    """Who decided a token: λ_t, the log-probability that each gave it, and what each would have said."""

    lam: float
    log_pema: float
    log_plm: float
    top_pema: list[tuple[int, float]]
    top_plm: list[tuple[int, float]]

    @property
    def decided_by(self) -> Literal["pema", "plm"]:
        """Whose share of the mixture is the greater."""
        pema = self.lam * math.exp(self.log_pema)
        return "pema" if pema >= (1 - self.lam) * math.exp(self.log_plm) else "plm"


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    Attributes:
        text: what may be shown now, which is not always this token's own text.
        finish: why the answer ends here, on its last token alone.
        top: most probable tokens and their log-probabilities.
    """

    id: int
    text: str
    log_prob: float
    finish: Literal["eos", "stop", "length"] | None = None
    top: list[tuple[int, float]] = field(default_factory=list)
    explained: Explained | None = None
