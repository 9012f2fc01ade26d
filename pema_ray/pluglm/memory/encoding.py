"""Texts to tokens, keys and values: a model's knowledge encoder at work. Knows torch and transformers; no Ray.

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

_BATCH = 64  # documents encoded together; a part of what is computed: another size may round differently


class Vectors(NamedTuple):
    """float32, on the CPU."""

    key_MQ: Tensor
    value_MD: Tensor


class DocumentEncoder:
    """A PlugLM model's knowledge encoder with its tokenizer: what writes into memories.

    Args:
        model: any PlugLM model; later changes of its weights are not seen by `fingerprint`: make another one then.
        name: what messages and manifests call it.

    Raises:
        UserError: the model reads memories of another encoder than its own (`config.memory_fingerprint`), so that what
            it wrote could not be found by what is there.
    """

    def __init__(self, model: PlugLMPreTrainedModel, tokenizer: Any, name: str = "pluglm") -> None:
        encoder = model.encoder
        self.name, self.tokenizer = name, tokenizer
        self.sizes = (encoder.config.query_size, encoder.config.hidden_size)  # (Q, D)
        self.max_tokens: int = encoder.config.max_document_tokens
        self.fingerprint = encoder.encoder_fingerprint()
        self.digest = encoder.encoder_fingerprint(torch.float32)  # of the very weights: names files
        self.tokenizer_fingerprint = fingerprint_of_tokenizer(tokenizer)
        self._documents = encoder.document_model()
        if (reads := model.config.memory_fingerprint) and reads != self.fingerprint:
            raise UserError(
                f"{name}: was trained on a memory of encoder '{reads}' and has moved away from it "
                f"('{self.fingerprint}'). It can read that memory; write with the model that it was fine-tuned from."
            )

    def copied(self) -> DocumentEncoder:
        """Apart from the model, on the CPU: to be sent to other processes, or kept while the model goes on learning."""
        other = copy.copy(self)
        other._documents = copy.deepcopy(self._documents).cpu().eval()
        return other

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of documents, special tokens included, cut at `max_document_tokens`."""
        return tokenize(self.tokenizer, texts, self.max_tokens)

    @torch.no_grad()
    def encode(self, documents: Sequence[Sequence[int]]) -> Vectors:
        """Keys and values of token ids, in order. The same documents give the same bits, on one kind of machine."""
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


def tokenize(tokenizer: Any, texts: Sequence[str], most: int) -> list[list[int]]:
    """Token ids of texts, special tokens included, at most `most` of each."""
    if not texts:
        return []
    return tokenizer(list(texts), truncation=True, max_length=most, return_attention_mask=False)["input_ids"]


def padded(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(tokens `[M, L]`, mask `[M, L]`) int64, padded on the right with 0, which nobody looks at."""
    length = max(map(len, documents))
    token_ML = torch.tensor([[*one, *[0] * (length - len(one))] for one in documents])
    mask_ML = torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in documents])
    return token_ML, mask_ML


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """16 hex digits that name a vocabulary: memories keep token ids of one."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
