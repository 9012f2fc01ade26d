"""The objective of pre-training: masked language modelling, and an optional contrastive warm-up of retrieval.
Knows torch; imports no Ray.

Shapes: B sequences, T positions, D hidden size, Q query size, L tokens of a document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM


class PretrainObjective(nn.Module):
    """`loss = Σ cross entropy · token_weight + contrastive · contrastive_weight`.

    The contrastive part (a departure from the paper) trains every memory layer's query to find the key of its
    sequence's document among those of the batch.

    Args:
        temperature: scores are q · key / (temperature · √d_q), or cos / temperature for retrieval by cosine.
    """

    def __init__(self, model: PlugLMForMaskedLM, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self,
        input_BT: Tensor,
        mask_BT: Tensor,
        label_BT: Tensor,
        document_B: Tensor,
        token_weight: Tensor,
        own_token_BL: Tensor | None = None,
        own_mask_BL: Tensor | None = None,
        contrastive_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, summed cross entropy of the masked tokens, contrastive loss, recall of the sequences' own documents
        in the last memory layer).

        Args:
            token_weight: weight of a masked token's cross entropy: one over their number in the whole step.
            own_token_BL, own_mask_BL: each sequence's own document; all masked: it has none.
            contrastive_weight: None: no warm-up.
        """
        warming = contrastive_weight is not None
        encoded = self.model.model(input_BT, mask_BT, own_document=document_B, output_retrieved=warming)
        predicted_BT = label_BT != IGNORED
        logits_NV = self.model.head(encoded.last_hidden_state[predicted_BT])
        entropy = F.cross_entropy(logits_NV.float(), label_BT[predicted_BT], reduction="sum")
        loss = entropy * token_weight
        contrastive = recall = torch.zeros((), device=entropy.device)
        if warming and encoded.retrieved:
            assert own_token_BL is not None
            assert own_mask_BL is not None
            contrastive, recall = self._contrastive(encoded.retrieved, document_B, own_token_BL, own_mask_BL)
            loss = loss + contrastive * contrastive_weight
        return loss, entropy.detach(), contrastive.detach(), recall.detach()

    def _contrastive(
        self, retrieved: tuple, document_B: Tensor, own_token_BL: Tensor, own_mask_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        has_B = own_mask_BL.any(1)
        if not bool(has_B.any()):
            zero = torch.stack([layer.query_BQ.sum() for layer in retrieved]).sum() * 0.0  # with a gradient for DDP
            return zero, torch.zeros((), device=document_B.device)
        key_PQ, _ = self.model.model.encode_documents(own_token_BL[has_B], own_mask_BL[has_B])
        document_P = document_B[has_B]
        same_PP = document_P[:, None] == document_P[None, :]
        wrong_PP = same_PP & ~torch.eye(len(document_P), dtype=torch.bool, device=same_PP.device)
        target_P = torch.arange(len(document_P), device=same_PP.device)
        losses, score_PP = [], same_PP
        for layer in retrieved:
            query_PQ = layer.query_BQ[has_B]
            if self.model.config.retrieval == "cosine":
                score_PP = F.normalize(query_PQ.float(), dim=-1) @ F.normalize(key_PQ.float(), dim=-1).T
            else:
                score_PP = query_PQ.float() @ key_PQ.float().T / query_PQ.shape[1] ** 0.5
            score_PP = (score_PP / self.temperature).masked_fill(wrong_PP, -torch.inf)
            losses.append(F.cross_entropy(score_PP, target_P))
        recall = (score_PP.argmax(1) == target_P).float().mean()
        return torch.stack(losses).mean(), recall
