"""Encodes texts as tokens, keys and values, by a model's knowledge encoder. Knows torch and transformers; no Ray.

Shapes: M documents, L tokens, Q query size, D hidden size.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.model.encoder import PlugLMPreTrainedModel

_BATCH = 64  # documents encoded together; another size may round differently


class Vectors(NamedTuple):
    """float32, on the CPU."""

    key_MQ: Tensor
    value_MD: Tensor


class DocumentEncoder:
    """A PlugLM model's knowledge encoder with its tokenizer; it writes the entries of memories.

    Args:
        model: any PlugLM model; `fingerprint` ignores later changes of its weights: make another encoder then.
        name: for messages and manifests.

    Raises:
        UserError: the model reads memories of another encoder than its own (`config.memory_fingerprint`).
    """

    def __init__(self, model: PlugLMPreTrainedModel, tokenizer: Any, name: str = "pluglm") -> None:
        encoder = model.encoder
        self.name, self.tokenizer = name, tokenizer
        self.sizes = (encoder.config.query_size, encoder.config.hidden_size)  # (Q, D)
        self.max_tokens: int = encoder.config.max_document_tokens
        self.fingerprint = encoder.encoder_fingerprint()
        self.digest = encoder.encoder_fingerprint(torch.float32)  # of the exact weights, for file names
        self.tokenizer_fingerprint = fingerprint_of_tokenizer(tokenizer)
        self._documents = encoder.document_model()
        if (reads := model.config.memory_fingerprint) and reads != self.fingerprint:
            raise UserError(
                f"{name}: was trained on a memory of encoder '{reads}' and has moved away from it "
                f"('{self.fingerprint}'). It can read that memory; write with the model that it was fine-tuned from."
            )

    def copied(self) -> DocumentEncoder:
        """A copy on the CPU that shares nothing with the model, for other processes."""
        encoder = copy.copy(self)
        encoder._documents = copy.deepcopy(self._documents).cpu().eval()
        return encoder

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of documents, special tokens included, cut at `max_document_tokens`."""
        if not texts:
            return []
        options = {"truncation": True, "max_length": self.max_tokens, "return_attention_mask": False}
        return self.tokenizer(list(texts), **options)["input_ids"]

    @torch.no_grad()
    def encode(self, documents: Sequence[Sequence[int]]) -> Vectors:
        """Keys and values of token ids, in order. The same documents give the same bits on the same kind of machine."""
        model, (Q, D) = self._documents, self.sizes
        was_training = {module: module.training for module in model.modules()}  # shared with the language model
        device = next(model.parameters()).device
        keys, values = [torch.zeros(0, Q)], [torch.zeros(0, D)]
        model.eval()
        try:
            for start in range(0, len(documents), _BATCH):
                token_ML, mask_ML = padded(documents[start : start + _BATCH])
                key_MQ, value_MD = model(token_ML.to(device), mask_ML.to(device))
                keys.append(key_MQ.float().cpu())
                values.append(value_MD.float().cpu())
        finally:
            for module, mode in was_training.items():
                module.training = mode
        return Vectors(torch.cat(keys), torch.cat(values))


def padded(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens `[M, L]`, mask `[M, L]`) int64, padded on the right with 0."""
    length = max(map(len, documents))
    token_ML = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in documents])
    mask_ML = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in documents])
    return token_ML, mask_ML


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """16 hex digits of a vocabulary: a memory's token ids belong to one."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
