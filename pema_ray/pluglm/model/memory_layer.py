"""A layer with attention over the memory instead of, or beside, its feed-forward network. Knows torch alone.

Shapes: B sequences, T positions, D hidden size (d), Q query size (d_q), K retrieved entries (k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from pema_ray.pluglm.model.attention import AttentivePooling, KnowledgeAttention, SentenceKnowledge, cosine


class Fetched(NamedTuple):
    """The entries retrieved for every sequence."""

    entry_BK: Tensor
    """Entry ids, best first."""
    score_BK: Tensor
    """Their ranking scores."""
    key_BKQ: Tensor
    value_BKD: Tensor


class Retrieved(NamedTuple):
    """The entries that one memory layer used, for reports and losses."""

    entry_BK: Tensor
    """Entry ids, best first (int64)."""
    score_BK: Tensor
    """Their ranking scores: q · key, or its cosine (`config.retrieval`)."""
    weight_BK: Tensor
    """Share of the attention, the mean over heads and unmasked tokens; sums to 1 over K."""
    query_BQ: Tensor
    """q, with its gradient."""


Fetch = Callable[[Tensor], Fetched]


class MemoryLayer(nn.Module):
    """`LN(a + FFN(a) + KA(a))` with `a = LN(h + SelfAttention(h))`; FFN is left out at width 0.

    Args:
        ordinary: the backbone's layer; its attention and last norm are reused.
        feed_forward: a feed-forward network without residual and norm; None: replaced by the memory.
    """

    def __init__(self, config: Any, ordinary: Any, feed_forward: nn.Module | None) -> None:
        super().__init__()
        D, backbone = config.hidden_size, config.backbone
        self.attention = ordinary.attention
        self.feed_forward = feed_forward
        self.pooler = AttentivePooling(D)
        self.query = nn.Linear(D, config.query_size)
        self.query_norm = nn.BatchNorm1d(config.query_size) if config.query_norm else nn.Identity()
        if config.knowledge_attention == "multi_head":
            self.knowledge: nn.Module = KnowledgeAttention(
                D, backbone.num_attention_heads, backbone.attention_probs_dropout_prob
            )
        else:
            self.knowledge = SentenceKnowledge()
        self.dropout = nn.Dropout(backbone.hidden_dropout_prob)
        self.norm = ordinary.output.LayerNorm

    def forward(
        self, state_BTD: Tensor, attention_mask: Tensor | None, mask_BT: Tensor, fetch: Fetch | None
    ) -> tuple[Tensor, Retrieved | None]:
        """(the layer's output `[B, T, D]`, the retrieved entries).

        Args:
            attention_mask: in the format of the backbone's attention.
            mask_BT: 1 at tokens, 0 at padding.
            fetch: retrieves entries; None: no memory, KA(a) = 0.
        """
        attended_BTD = self.attention(state_BTD, attention_mask)[0]
        total_BTD = attended_BTD if self.feed_forward is None else attended_BTD + self.feed_forward(attended_BTD)
        if fetch is None:
            return self.norm(total_BTD), None
        query_BQ = self._query(attended_BTD, mask_BT)
        fetched = fetch(query_BQ)
        cosine_BK = cosine(query_BQ, fetched.key_BKQ)
        read_BTD, weight_BTK = self.knowledge(attended_BTD, cosine_BK, fetched.value_BKD)
        weight_BK = (weight_BTK * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(1, keepdim=True)
        retrieved = Retrieved(fetched.entry_BK, fetched.score_BK, weight_BK, query_BQ)
        return self.norm(total_BTD + self.dropout(read_BTD)), retrieved

    def _query(self, attended_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        query_BQ = self.query(self.pooler(attended_BTD, mask_BT))
        if self.training and len(query_BQ) == 1 and isinstance(self.query_norm, nn.BatchNorm1d):
            norm = self.query_norm  # one sequence has no variance: use the running statistics
            return nn.functional.batch_norm(
                query_BQ, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        return self.query_norm(query_BQ)
