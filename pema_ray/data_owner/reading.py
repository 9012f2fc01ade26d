"""What goes along with a decoding session on the data owner's side: it says what comes next, and is told what came.

Whoever looks at the newest representation alone (published PEMA, kNN-LM) needs no memory of the sequence.
B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pema_ray.line import LMHead


class Reading(Protocol):
    """One batch of sequences being decoded."""

    def log_probs(self, state_BH: torch.Tensor) -> torch.Tensor:
        """float32 log-probabilities `[B, V]` of the next token, given the newest representation of every sequence."""
        ...

    def follow(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Sequence i is from now on what `rows[i]` was, followed by `tokens[i]`."""
        ...


class _Predictor(Protocol):
    def log_probs(self, state_NH: torch.Tensor, head: LMHead) -> torch.Tensor: ...


class Stateless:
    """A reading of the newest representation alone."""

    def __init__(self, predictor: _Predictor, head: LMHead) -> None:
        self._predictor, self._head = predictor, head

    def log_probs(self, state_BH: torch.Tensor) -> torch.Tensor:
        return self._predictor.log_probs(state_BH, self._head)

    def follow(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        pass
