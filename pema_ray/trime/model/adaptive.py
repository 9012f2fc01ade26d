"""Adaptive input embeddings and the adaptive softmax tied to them (Baevski and Auli 2019). Knows torch alone.

Words are numbered from the most frequent on, and lie in bands: the first keeps the model's size, each further one has
embeddings smaller by a factor. The softmax's head chooses among the words of the first band and the further bands
("tail clusters"); a tail cluster chooses among its words.

Shapes: B sequences, T positions, N states, H hidden, V words, K words of a band, D the size of its embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pema_ray.trime.model.memory_lm import VocabularyScore
from pema_ray.trime.objective.softmax import log_normaliser, sum_dtype


class Bands(NamedTuple):
    """Where bands begin and end, and how wide they are."""

    edges: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, vocabulary: int, cutoffs: Sequence[int], factor: float, hidden: int) -> Bands:
        """Cut-offs beyond the vocabulary are dropped."""
        edges = (0, *(cut for cut in cutoffs if cut < vocabulary), vocabulary)
        return cls(edges, tuple(int(hidden // factor**band) for band in range(len(edges) - 1)))

    def __len__(self) -> int:
        return len(self.sizes)

    def words(self, band: int) -> int:
        return self.edges[band + 1] - self.edges[band]


class AdaptiveEmbedding(nn.Module):
    """Token ids to embeddings `[B, T, H]`: those of a band, mapped to the model's size."""

    def __init__(self, bands: Bands, hidden_size: int) -> None:
        super().__init__()
        self.bands, self.hidden_size = bands, hidden_size
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(bands.words(band), size) * size**-0.5) for band, size in enumerate(bands.sizes)
        )
        self.projections = nn.ParameterList(
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden_size, size))) for size in bands.sizes
        )

    def forward(self, token_BT: Tensor) -> Tensor:
        embedded = self.projections[0].new_zeros(*token_BT.shape, self.hidden_size)
        for band, weight_KD in enumerate(self.weights):
            first, end = self.bands.edges[band], self.bands.edges[band + 1]
            in_band_BT = (token_BT >= first) & (token_BT < end)
            projected = F.linear(F.embedding(token_BT[in_band_BT] - first, weight_KD), self.projections[band])
            embedded = embedded.masked_scatter(in_band_BT[..., None], projected.to(embedded.dtype))
        return embedded


class AdaptiveSoftmax(nn.Module):
    """The softmax over a band's words and the further bands, its word vectors those of the embedding.

    Args:
        tie_projections: the tails' maps are the embedding's as well, transposed; else they are learned apart.
        tail_dropout: in the tail clusters, before their words are chosen.
    """

    def __init__(self, embedding: AdaptiveEmbedding, tie_projections: bool, tail_dropout: float) -> None:
        super().__init__()
        self.bands, self.tail_dropout = embedding.bands, tail_dropout
        self._tied = [embedding]  # in a list: the embedding's parameters are registered under one name only
        tails = len(self.bands) - 1
        self.cluster_HC = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tails, embedding.hidden_size)))
        self.maps = nn.ParameterList(
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(size, embedding.hidden_size)))
            for size in (() if tie_projections else self.bands.sizes[1:])
        )

    @property
    def _head_KH(self) -> Tensor:
        """Words of the first band, then one row for each tail cluster."""
        return torch.cat([self._words(0), self.cluster_HC])

    def _words(self, band: int) -> Tensor:
        return cast(Tensor, self._tied[0].weights[band])

    def _tail(self, band: int, state_NH: Tensor) -> Tensor:
        """States projected to the size of a tail cluster, `[N, D]`."""
        tied_HD, dtype = self._tied[0].projections[band], state_NH.dtype
        small = F.linear(state_NH, self.maps[band - 1].to(dtype)) if len(self.maps) else state_NH @ tied_HD.to(dtype)
        return F.dropout(small, self.tail_dropout, self.training)

    def score(self, state_NH: Tensor, target_N: Tensor) -> VocabularyScore:
        """log P(target) `[N]` and the head's log-normaliser `[N]`; a tail computes only its own targets.

        A tail without targets is computed too, on zero rows: all processes must use the same parameters.
        """
        head_KH = self._head_KH.to(state_NH.dtype)
        normaliser_N = log_normaliser(state_NH, head_KH)
        column_N, within = target_N, []
        for band in range(1, len(self.bands)):
            first, end = self.bands.edges[band], self.bands.edges[band + 1]
            in_band_N = (target_N >= first) & (target_N < end)
            column_N = torch.where(in_band_N, self.bands.edges[1] + band - 1, column_N)
            within.append(in_band_N.nonzero()[:, 0])
        log_prob_N = _dot(state_NH, head_KH, column_N) - normaliser_N
        for band, index_n in enumerate(within, start=1):
            small_nD, words_KD = self._tail(band, state_NH[index_n]), self._words(band).to(state_NH.dtype)
            target_n = target_N[index_n] - self.bands.edges[band]
            inner_n = _dot(small_nD, words_KD, target_n) - log_normaliser(small_nD, words_KD)
            log_prob_N = log_prob_N.index_add(0, index_n, inner_n)
        return VocabularyScore(log_prob_N, normaliser_N)

    def log_probs(self, state_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(log P `[N, V]`, the head's log-normaliser `[N]`), whole."""
        head, normaliser_N = full_log_probs(state_NH, self._head_KH)
        parts = [head[:, : self.bands.edges[1]]]
        for band in range(1, len(self.bands)):
            inner = F.linear(self._tail(band, state_NH), self._words(band).to(state_NH.dtype)).to(head.dtype)
            parts.append(head[:, self.bands.edges[1] + band - 1, None] + inner.log_softmax(-1))
        return torch.cat(parts, 1), normaliser_N


class TiedSoftmax(nn.Module):
    """The plain softmax over all words, its vectors those of an embedding `[V, H]`."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._tied = [embedding]

    def score(self, state_NH: Tensor, target_N: Tensor) -> VocabularyScore:
        return full_score(state_NH, self._tied[0].weight, target_N)

    def log_probs(self, state_NH: Tensor) -> tuple[Tensor, Tensor]:
        return full_log_probs(state_NH, self._tied[0].weight)


def full_score(state_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> VocabularyScore:
    """log P(target) `[N]` and the log-normaliser `[N]` of a plain softmax without bias."""
    weight_VH = weight_VH.to(state_NH.dtype)
    normaliser_N = log_normaliser(state_NH, weight_VH)
    return VocabularyScore(_dot(state_NH, weight_VH, target_N) - normaliser_N, normaliser_N)


def full_log_probs(state_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(log P `[N, V]`, log-normaliser `[N]`) of a plain softmax without bias."""
    logits = F.linear(state_NH, weight_VH.to(state_NH.dtype)).to(sum_dtype(state_NH))
    normaliser_N = logits.logsumexp(-1)
    return logits - normaliser_N[:, None], normaliser_N


def _dot(state_NH: Tensor, weight_KH: Tensor, index_N: Tensor) -> Tensor:
    """The logit of one word for each state."""
    dtype = sum_dtype(state_NH)
    return torch.linalg.vecdot(state_NH.to(dtype), F.embedding(index_N, weight_KH).to(dtype))
