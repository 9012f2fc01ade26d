"""The interface of a TRIME language model: states, memory keys, and a vocabulary softmax. Knows torch alone.

Shapes: B sequences, T positions, H hidden size, N positions of any sequences, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class LMStates(NamedTuple):
    """States and keys of every position."""

    state_BTH: Tensor
    """f(c): the final state, which the output embeddings are multiplied with."""
    key_BTH: Tensor
    """g(c): the memory key, the input of the last layer's feed-forward block."""


class VocabularyScore(NamedTuple):
    """The vocabulary's part of equation 2 for given targets."""

    log_prob_N: Tensor
    """log of the softmax over the vocabulary alone, at the target."""
    log_normaliser_N: Tensor
    """log Σ_w exp(E_w · f); of an adaptive softmax, that of its head cluster."""


@runtime_checkable
class MemoryLM(Protocol):
    """A causal language model that TRIME trains and evaluates (section 2)."""

    hidden_size: int
    vocabulary_size: int
    max_positions: int

    def represent(self, token_BT: Tensor) -> LMStates:
        """States and keys of `token_BT` (int64 [B, T]); position t sees tokens 0 … t."""
        ...

    def score(self, state_NH: Tensor, target_N: Tensor) -> VocabularyScore:
        """Log-probabilities of `target_N` (int64 [N]) and the normalisers, without all logits in memory."""
        ...

    def log_probs(self, state_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probabilities [N, V], log-normalisers [N]) of the whole vocabulary."""
        ...


class TrainableLM(nn.Module, MemoryLM):
    """A `MemoryLM` that is a torch module: it can be trained, saved and loaded."""

    def forward(self, token_BT: Tensor) -> LMStates:
        return self.represent(token_BT)
