"""Makes a key and a value of a document, with gradients. Knows torch alone.

Shapes: M documents, L tokens, D hidden size, Q query size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from pema_ray.pluglm.attention import AttentivePooling


class KnowledgeEncoder(nn.Module):
    """Document → the model's own embeddings → attentive pool e; key = W_k e + b, value = W_v e + b.

    The embeddings belong to the model and are handed over with every call, so that they are saved, moved and
    trained once.
    """

    def __init__(self, hidden_size: int, query_size: int, value_pooler: bool) -> None:
        super().__init__()
        self.pooler = AttentivePooling(hidden_size)
        self.value_pooler = AttentivePooling(hidden_size) if value_pooler else None
        self.key = nn.Linear(hidden_size, query_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, embed: Callable[[Tensor], Tensor], token_ML: Tensor, mask_ML: Tensor) -> tuple[Tensor, Tensor]:
        """(keys `[M, Q]`, values `[M, D]`) of documents `token_ML` (int64, padded where `mask_ML` is 0)."""
        embedded_MLD = embed(token_ML)
        pooled_MD = self.pooler(embedded_MLD, mask_ML)
        read_MD = pooled_MD if self.value_pooler is None else self.value_pooler(embedded_MLD, mask_ML)
        return self.key(pooled_MD), self.value(read_MD)
