"""The PlugLM encoder and its masked-language-model head. Knows torch and transformers; imports no Ray.

Shapes: B sequences, T positions, D hidden size, Q query size, K retrieved entries, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import ModelOutput

from pema_ray.errors import UserError
from pema_ray.pluglm.learning.masking import mean_entropy
from pema_ray.pluglm.model.attention import KnowledgeAttention
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.knowledge import Knowledge, require_entries
from pema_ray.pluglm.model.knowledge_encoder import DocumentModel, KnowledgeEncoder
from pema_ray.pluglm.model.memory_layer import Fetched, MemoryLayer, Retrieved


class StaleKeys(UserError):
    """A memory's keys were made by another knowledge encoder than the model's."""

    def __init__(self, memory: str, found: str, expected: str) -> None:
        super().__init__(
            f"{memory}: its keys were made by encoder '{found}', but this model reads those of encoder '{expected}'. "
            "Encode it again (pema-ray pluglm memory refresh), or use the model it was made with."
        )
        self.memory, self.found, self.expected = memory, found, expected

    def __reduce__(self):
        return (StaleKeys, (self.memory, self.found, self.expected))


@dataclass
class PlugLMOutput(ModelOutput):
    """Output of the encoder."""

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    retrieved: tuple[Retrieved, ...] | None = None
    """Entries of each memory layer, with `output_retrieved` and an attached memory."""


@dataclass
class PlugLMMaskedLMOutput(MaskedLMOutput):
    """Output of the masked language model."""

    retrieved: tuple[Retrieved, ...] | None = None


class PlugLMPreTrainedModel(PreTrainedModel):
    """Base of all PlugLM models; `self.model` is the `PlugLMModel` of a model with a head."""

    config_class = PlugLMConfig
    config: PlugLMConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["MemoryLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KnowledgeAttention):
            initialization.ones_(module.beta)  # leaves a checkpoint's parameters alone

    @property
    def encoder(self) -> PlugLMModel:
        """The model without its head."""
        return self if isinstance(self, PlugLMModel) else self.model

    def attach(self, knowledge: Knowledge | None, allow_stale: bool = False) -> None:
        """Read this version of a memory from now on; running forward passes keep the previous one.

        Args:
            knowledge: None: use no memory; knowledge attention then adds nothing.
            allow_stale: accept keys of an older encoder, as in training.

        Raises:
            UserError: the memory is empty, too small, or of other sizes.
            StaleKeys: it was made by another knowledge encoder.
        """
        if knowledge is not None:
            require_entries(knowledge.name, len(knowledge), self.config.top_k)
            if knowledge.sizes != (sizes := (self.config.query_size, self.config.hidden_size)):
                raise UserError(
                    f"{knowledge.name}: keys and values of {knowledge.sizes} numbers, but this model reads {sizes}."
                )
            if not allow_stale and knowledge.fingerprint != (expected := self.fingerprint()):
                raise StaleKeys(knowledge.name, knowledge.fingerprint, expected)
        self.encoder._knowledge, self.encoder._attach_called = knowledge, True

    @property
    def knowledge(self) -> Knowledge | None:
        """The attached version of the memory."""
        return self.encoder._knowledge

    def fingerprint(self) -> str:
        """16 hex digits of the encoder whose memories this model reads: its own, or `config.memory_fingerprint`."""
        return self.config.memory_fingerprint or self.encoder.encoder_fingerprint()


class PlugLMModel(PlugLMPreTrainedModel):
    """Backbone with its last M layers made memory layers, and the knowledge encoder."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        backbone_config: Any = config.backbone
        options = {} if backbone_config.model_type == "electra" else {"add_pooling_layer": False}
        self.backbone: Any = AutoModel.from_config(backbone_config, **options)
        layers, first = self.backbone.encoder.layer, config.num_hidden_layers - config.memory_layers
        for index in range(first, config.num_hidden_layers):
            width = config.memory_feed_forward
            parallel = feed_forward(backbone_config, width) if width else None
            layers[index] = MemoryLayer(config, layers[index], parallel)
        self.knowledge_encoder = KnowledgeEncoder(config.hidden_size, config.query_size, config.value_pooler)
        self._knowledge: Knowledge | None = None
        self._attach_called = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        own_document: Tensor | None = None,
        output_retrieved: bool = False,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> PlugLMOutput:
        """States `[B, T, D]` of the tokens.

        Args:
            own_document: `[B]` document codes (`knowledge.document_codes`). With `config.exclude_own`, a sequence does
                not retrieve entries of its own document.

        Raises:
            UserError: `attach` was not called, or too few entries may be retrieved.
        """
        if not self._attach_called:
            raise UserError(
                "This PlugLM model has no memory yet: model.attach(knowledge), or model.attach(None) to go without."
            )
        embedded_BTD = self.backbone.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        if (project := self._embeddings_project) is not None:
            embedded_BTD = project(embedded_BTD)
        mask_BT = (
            torch.ones(embedded_BTD.shape[:2], device=embedded_BTD.device) if attention_mask is None else attention_mask
        )
        backbone_mask = create_bidirectional_mask(
            config=self.backbone.config, inputs_embeds=embedded_BTD, attention_mask=attention_mask
        )
        knowledge = self._knowledge  # one version for the whole pass, even if another one is attached meanwhile
        own_B = own_document if self.config.exclude_own else None
        fetch = None if knowledge is None else lambda query_BQ: self._fetch(knowledge, query_BQ, own_B)
        state_BTD, states, retrieved_by_layer = embedded_BTD, [embedded_BTD], []
        for layer in self.backbone.encoder.layer:
            if isinstance(layer, MemoryLayer):
                state_BTD, retrieved = layer(state_BTD, backbone_mask, mask_BT, fetch)
                retrieved_by_layer += [] if retrieved is None else [retrieved]
            else:
                output = layer(state_BTD, backbone_mask)
                state_BTD = output[0] if isinstance(output, tuple) else output
            states.append(state_BTD)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return PlugLMOutput(
            last_hidden_state=state_BTD,
            hidden_states=tuple(states) if output_hidden_states else None,
            retrieved=tuple(retrieved_by_layer) if output_retrieved and retrieved_by_layer else None,
        )

    # ── the memory ──────────────────────────────────────────────────────────

    @property
    def _embeddings_project(self) -> nn.Module | None:
        """ELECTRA's map from its narrower embeddings."""
        return getattr(self.backbone, "embeddings_project", None)

    def document_model(self) -> DocumentModel:
        """The document encoder; it shares its weights with this model."""
        return DocumentModel(self.backbone.embeddings, self._embeddings_project, self.knowledge_encoder)

    def encode_documents(self, token_ML: Tensor, mask_ML: Tensor) -> tuple[Tensor, Tensor]:
        """(keys `[M, Q]`, values `[M, D]`) of documents, with gradients to the encoder and the embeddings."""
        return self.document_model()(token_ML, mask_ML)

    def encoder_fingerprint(self, dtype: torch.dtype = torch.bfloat16) -> str:
        """16 hex digits that name the knowledge encoder: its weights and the embeddings', rounded to `dtype`.

        With bfloat16, a model saved as float32 and loaded as bfloat16 still reads its memories.
        """
        digest = hashlib.sha256(f"pluglm {self.config.query_size} {self.config.max_document_tokens}".encode())
        for name, tensor in sorted(self.document_model().state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _fetch(self, knowledge: Knowledge, query_BQ: Tensor, own_B: Tensor | None) -> Fetched:
        """Entries for a memory layer, found by stored keys; in training, their documents are encoded again."""
        c = self.config
        entry_BK, score_BK = knowledge.search(query_BQ.detach(), c.top_k, own_B, cosine=c.retrieval == "cosine")
        fresh_keys, fresh_values = self.training and not c.fix_keys, self.training and not c.fix_values
        key_BKQ = value_BKD = None
        if fresh_keys or fresh_values:
            entry_M, row_BK = entry_BK.unique(return_inverse=True)
            token_ML, mask_ML, row_BK = (t.to(query_BQ.device) for t in (*knowledge.tokens(entry_M), row_BK))
            key_MQ, value_MD = self.encode_documents(token_ML, mask_ML)
            key_BKQ, value_BKD = key_MQ[row_BK], value_MD[row_BK]
        if not (fresh_keys and fresh_values):
            stored_key, stored_value = (t.to(query_BQ) for t in knowledge.vectors(entry_BK))
            key_BKQ = key_BKQ if fresh_keys else stored_key
            value_BKD = value_BKD if fresh_values else stored_value
        assert key_BKQ is not None
        assert value_BKD is not None
        return Fetched(entry_BK, score_BK, key_BKQ, value_BKD)


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, and a softmax layer tied to the word embeddings."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone
        E = getattr(backbone, "embedding_size", config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, E)
        self.act = ACT2FN["gelu" if backbone.model_type != "bert" else backbone.hidden_act]
        self.norm = nn.LayerNorm(E, eps=backbone.layer_norm_eps)
        self.decoder = nn.Linear(E, config.vocab_size)

    def forward(self, state_XD: Tensor) -> Tensor:
        """Logits `[..., V]`."""
        return self.decoder(self.norm(self.act(self.dense(state_XD))))


class PlugLMForMaskedLM(PlugLMPreTrainedModel):
    """The encoder with a masked-language-model head, for pre-training and `fill-mask`."""

    _tied_weights_keys = {"head.decoder.weight": "model.backbone.embeddings.word_embeddings.weight"}

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.model = PlugLMModel(config)
        self.head = MaskedLMHead(config)
        self.post_init()

    @classmethod
    def from_backbone(cls, name: str, seed: int = 0, **settings: Any) -> PlugLMForMaskedLM:
        """A model around a BERT-family checkpoint; its new weights are drawn with `seed`.

        Args:
            name: a hub name or folder.
            settings: fields of `PlugLMConfig`.
        """
        from pema_ray.pluglm.model.loading import load_backbone

        return load_backbone(cls, name, seed, settings)

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.decoder = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> PlugLMMaskedLMOutput:
        """Logits `[B, T, V]`; with labels (-100 where none) their mean cross entropy. `options`: the encoder's."""
        encoded = self.model(input_ids, attention_mask, token_type_ids, **options)
        logits_BTV = self.head(encoded.last_hidden_state)
        loss = None if labels is None else mean_entropy(logits_BTV, labels)
        return PlugLMMaskedLMOutput(
            loss=loss, logits=logits_BTV, hidden_states=encoded.hidden_states, retrieved=encoded.retrieved
        )


def feed_forward(backbone_config: Any, width: int) -> nn.Sequential:
    """An ordinary layer's feed-forward network of another width, without its residual and norm."""
    D, act = backbone_config.hidden_size, backbone_config.hidden_act
    activation, dropout = ACT2FN[act] if isinstance(act, str) else act, nn.Dropout(backbone_config.hidden_dropout_prob)
    return nn.Sequential(nn.Linear(D, width), activation, nn.Linear(width, D), dropout)


AutoConfig.register("pluglm", PlugLMConfig)
AutoModel.register(PlugLMConfig, PlugLMModel)
AutoModelForMaskedLM.register(PlugLMConfig, PlugLMForMaskedLM)
