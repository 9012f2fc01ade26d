"""Attentive pooling and knowledge attention. Mathematics: knows torch alone.

Shapes: B sequences, T positions, D hidden size (d), Q query size (d_q), K retrieved entries (k), H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentivePooling(nn.Module):
    """Weighted mean of vectors: weights ∝ mask · exp(w2ᵀ tanh(W1 x))."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, state_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """`[B, D]`; `mask_BT` is true (or 1) at tokens, of which every row has at least one."""
        score_BT = self.score(torch.tanh(self.hidden(state_BTD))).squeeze(-1)
        # exp of the raw score, as published, overflows in half precision; the softmax is the same quotient.
        weight_BT = score_BT.float().masked_fill(~mask_BT.bool(), -torch.inf).softmax(-1).to(state_BTD.dtype)
        return (weight_BT.unsqueeze(1) @ state_BTD).squeeze(1)


class KnowledgeAttention(nn.Module):
    """Attention of every token over the K entries that its sequence retrieved (`multi_head`).

    s_{h,t,i} = (W^Q a_t)_h · (W^K v_i)_h / √(d/H) + β_h cos(q, key_i); softmax over i; heads of W^V v_i, merged by an
    output projection. β_h is learned and starts at 1.
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_size = heads, hidden_size // heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.beta = nn.Parameter(torch.ones(heads))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state_BTD: Tensor, cosine_BK: Tensor, value_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """(output `[B, T, D]`, weights of the entries `[B, T, K]`, averaged over heads)."""
        B, T, D = state_BTD.shape
        query_BHTd = self._split(self.query(state_BTD))
        key_BHKd = self._split(self.key(value_BKD))
        value_BHKd = self._split(self.value(value_BKD))
        score_BHTK = query_BHTd @ key_BHKd.transpose(-1, -2) / self.head_size**0.5
        score_BHTK = score_BHTK + self.beta[None, :, None, None] * cosine_BK[:, None, None, :]
        weight_BHTK = score_BHTK.float().softmax(-1).to(state_BTD.dtype)
        # Head by head *within* a token: merging [B, H, T, d] without the transpose hands tokens each other's outputs.
        read_BTD = (self.dropout(weight_BHTK) @ value_BHKd).transpose(1, 2).reshape(B, T, D)
        return self.output(read_BTD), weight_BHTK.mean(1)

    def _split(self, x_BXD: Tensor) -> Tensor:
        B, X, _ = x_BXD.shape
        return x_BXD.view(B, X, self.heads, self.head_size).transpose(1, 2)


class SentenceKnowledge(nn.Module):
    """One mixture of values for a whole sequence: weights are the softmax of cos(q, key_i) (`sentence_level`)."""

    def forward(self, state_BTD: Tensor, cosine_BK: Tensor, value_BKD: Tensor) -> tuple[Tensor, Tensor]:
        """As `KnowledgeAttention.forward`; every token gets the same."""
        T = state_BTD.shape[1]
        weight_BK = cosine_BK.float().softmax(-1).to(value_BKD.dtype)
        read_BD = (weight_BK.unsqueeze(1) @ value_BKD).expand(-1, T, -1)
        return read_BD, weight_BK.unsqueeze(1).expand(-1, T, -1)


def cosine(query_BQ: Tensor, key_BKQ: Tensor) -> Tensor:
    """cos(q, key_i) `[B, K]`, in float32: halves of long vectors overflow when they are squared."""
    return F.cosine_similarity(query_BQ.float().unsqueeze(1), key_BKQ.float(), dim=-1).to(query_BQ.dtype)
