"""Configuration of a PlugLM model: a backbone and its memory layers. Knows transformers alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from pema_ray.errors import UserError, nearest

KnowledgeAttentionKind = Literal["multi_head", "sentence_level"]
RetrievalKind = Literal["inner_product", "cosine"]
# The BERT family: the same parts under the same names (embeddings, encoder.layer[i].attention, …).
BACKBONES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


@strict
class PlugLMConfig(PreTrainedConfig):
    """Sizes as published for BERT-base; every departure from the paper is off by default."""

    model_type = "pluglm"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone": SubConfigSpec(config_class=AutoConfig, model_type="bert")
    }

    backbone: PreTrainedConfig | dict | None = None
    """Config of the encoder: its ordinary layers, attention and embeddings."""
    memory_layers: int = 1
    """M: the last M layers attend to the memory."""
    memory_feed_forward: int = 768
    """Width of the feed-forward network in parallel to knowledge attention; 0: replaced by it."""
    knowledge_attention: str = "multi_head"
    """`multi_head`, token by token, or `sentence_level`: one mixture of values for all tokens."""
    query_size: int = 128
    """d_q, of queries and keys."""
    query_norm: bool = True
    """BatchNorm on queries."""
    top_k: int = 5
    """k, entries that a sequence retrieves in a layer."""
    max_document_tokens: int = 288
    """L, special tokens included."""
    retrieval: str = "inner_product"
    """Ranks entries; `cosine` (a departure) is also the attention's bias."""
    value_pooler: bool = False
    """A separate pooler for values (a departure)."""
    exclude_own: bool = False
    """A sequence does not retrieve the document it was cut from (`own_document`)."""
    fix_keys: bool = False
    """While training, take keys as stored instead of encoding retrieved documents again."""
    fix_values: bool = False
    """The same of values."""
    memory_fingerprint: str | None = None
    """Fingerprint of the memories this model reads, if fine-tuning changed its own knowledge encoder; None: its own."""
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        backbone: Any = self.backbone
        if backbone.model_type not in BACKBONES:
            raise UserError(
                f"PlugLM backbone '{backbone.model_type}': not of the BERT family; use one of {', '.join(BACKBONES)}."
            )
        self.pad_token_id = backbone.pad_token_id
        self.tie_word_embeddings = bool(getattr(backbone, "tie_word_embeddings", True))
        for name, kinds in (("knowledge_attention", KnowledgeAttentionKind), ("retrieval", RetrievalKind)):
            value, choices = getattr(self, name), get_args(kinds)
            if value not in choices:
                raise UserError(f"PlugLM {name} '{value}': use {' or '.join(choices)}.{nearest(value, choices)}")
        if not 1 <= self.memory_layers <= self.num_hidden_layers:
            raise UserError(
                f"PlugLM memory_layers={self.memory_layers}: the backbone has {self.num_hidden_layers} layers."
            )
        for name, minimum in (("memory_feed_forward", 0), ("query_size", 1), ("top_k", 1), ("max_document_tokens", 3)):
            if getattr(self, name) < minimum:
                raise UserError(f"PlugLM {name}={getattr(self, name)}: at least {minimum}.")
        if self.max_document_tokens > self.document_positions:
            raise UserError(
                f"PlugLM max_document_tokens={self.max_document_tokens}: the backbone has {self.document_positions} "
                "positions."
            )

    # The backbone's sizes, under the names that transformers, its Trainer and its pipelines read.

    @property
    def hidden_size(self) -> int:
        return self._backbone.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self._backbone.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self._backbone.num_attention_heads

    @property
    def vocab_size(self) -> int:
        return self._backbone.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:  # of resize_token_embeddings
        self._backbone.vocab_size = size

    @property
    def max_position_embeddings(self) -> int:
        return self._backbone.max_position_embeddings

    @property
    def document_positions(self) -> int:
        """Tokens that fit: RoBERTa and CamemBERT count positions from behind the padding id."""
        is_roberta = self._backbone.model_type in ("roberta", "xlm-roberta", "camembert")
        return self.max_position_embeddings - (self._backbone.pad_token_id + 1 if is_roberta else 0)

    @property
    def _backbone(self) -> Any:
        return self.backbone
