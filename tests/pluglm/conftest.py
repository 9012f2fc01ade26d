"""A tokenizer of whole words and tiny PlugLM models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from pema_ray.pluglm.demonstration.facts import SPECIAL, word_tokenizer
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM

WORDS = [f"w{number}" for number in range(120)]
BACKBONE = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="session")
def words_tokenizer() -> PreTrainedTokenizerFast:
    """`w0` … `w119`, with BERT's special tokens."""
    return word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PlugLMForMaskedLM]:
    """`make_model(seed=0, **settings)`: three layers, the last `memory_layers` (1) of them memory layers."""

    def make(seed: int = 0, backbone: dict[str, Any] | None = None, **settings: Any) -> PlugLMForMaskedLM:
        sizes = {"model_type": "bert", **BACKBONE, **(backbone or {})}
        defaults = {"memory_feed_forward": 0, "query_size": 8, "top_k": 3, "max_document_tokens": 16}
        torch.manual_seed(seed)
        model = PlugLMForMaskedLM(
            PlugLMConfig(backbone=AutoConfig.for_model(**sizes).to_dict(), **(defaults | settings))
        )
        with torch.no_grad():  # larger than usual initial weights, so that everything has an influence
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
                elif "beta" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def facts() -> list[NewEntry]:
    """Twelve entries of two sources, two of each document."""
    return [
        NewEntry(f"w{n} w{n + 20} w{n * 3}", source="a" if n < 6 else "b", document_id=f"doc{n // 2}")
        for n in range(12)
    ]


@pytest.fixture
def model(make_model) -> PlugLMForMaskedLM:
    return make_model()


@pytest.fixture
def encoder(model, words_tokenizer) -> DocumentEncoder:
    return DocumentEncoder(model, words_tokenizer, "tiny")
