"""Encodes a document as a key and a value, with gradients. Knows torch alone.

Shapes: M documents, L tokens, D hidden size, Q query size.
"""

from __future__ import annotations

from torch import Tensor, nn

from pema_ray.pluglm.model.attention import AttentivePooling


class KnowledgeEncoder(nn.Module):
    """Embedded document → attentive pool e; key = W_k e + b, value = W_v e + b. One memory serves all layers.

    With a value pooler (a departure from the paper), values have a separate pool.
    """

    def __init__(self, hidden_size: int, query_size: int, value_pooler: bool) -> None:
        super().__init__()
        self.pooler = AttentivePooling(hidden_size)
        self.value_pooler = AttentivePooling(hidden_size) if value_pooler else None
        self.key = nn.Linear(hidden_size, query_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, embedded_MLD: Tensor, mask_ML: Tensor) -> tuple[Tensor, Tensor]:
        """(keys `[M, Q]`, values `[M, D]`)."""
        pooled_MD = self.pooler(embedded_MLD, mask_ML)
        read_MD = pooled_MD if self.value_pooler is None else self.value_pooler(embedded_MLD, mask_ML)
        return self.key(pooled_MD), self.value(read_MD)


class DocumentModel(nn.Module):
    """Token ids to keys and values: the knowledge encoder over the language model's own embeddings.

    Args:
        embeddings: the backbone's (word, position, type, norm), shared with it: both train them.
        project: ELECTRA's map from its narrower embeddings.
    """

    def __init__(self, embeddings: nn.Module, project: nn.Module | None, encoder: KnowledgeEncoder) -> None:
        super().__init__()
        self.embeddings, self.project, self.encoder = embeddings, project, encoder

    def forward(self, token_ML: Tensor, mask_ML: Tensor) -> tuple[Tensor, Tensor]:
        """(keys `[M, Q]`, values `[M, D]`) of documents `token_ML` (int64, padded where `mask_ML` is 0)."""
        embedded_MLD = self.embeddings(input_ids=token_ML)
        if self.project is not None:
            embedded_MLD = self.project(embedded_MLD)
        return self.encoder(embedded_MLD, mask_ML)
