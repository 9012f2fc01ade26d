"""PlugLM with heads for tasks: a label or a number for a sequence, a label for each token, a span as an answer.

`from_pretrained` of a pre-trained folder loads the encoder without the masked-language-model head.

Shapes: B sequences, T positions, D hidden size, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from pema_ray.pluglm.learning.masking import mean_entropy
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMModel, PlugLMPreTrainedModel
from pema_ray.pluglm.model.memory_layer import Retrieved


@dataclass
class PlugLMClassifierOutput(SequenceClassifierOutput):
    """Output of a classifier of sequences."""

    retrieved: tuple[Retrieved, ...] | None = None


@dataclass
class PlugLMTokenOutput(TokenClassifierOutput):
    """Output of a classifier of tokens."""

    retrieved: tuple[Retrieved, ...] | None = None


@dataclass
class PlugLMAnswerOutput(QuestionAnsweringModelOutput):
    """Output of extractive question answering."""

    retrieved: tuple[Retrieved, ...] | None = None


def _dropout(config: PlugLMConfig) -> nn.Dropout:
    backbone: Any = config.backbone
    share = getattr(backbone, "classifier_dropout", None)
    return nn.Dropout(backbone.hidden_dropout_prob if share is None else share)


class PlugLMForSequenceClassification(PlugLMPreTrainedModel):
    """BERT's pooler (dense and tanh on the first token's state), then C classes or one number (`regression`)."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.model = PlugLMModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> PlugLMClassifierOutput:
        """Logits `[B, C]`; labels `[B]` are classes, or numbers where `config.problem_type` is "regression"."""
        encoded = self.model(input_ids, attention_mask, token_type_ids, **options)
        logits_BC = self.classifier(self.dropout(torch.tanh(self.pooler(encoded.last_hidden_state[:, 0]))))
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = F.mse_loss(logits_BC.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits_BC.float(), labels)
        return PlugLMClassifierOutput(
            loss=loss, logits=logits_BC, hidden_states=encoded.hidden_states, retrieved=encoded.retrieved
        )


class PlugLMForTokenClassification(PlugLMPreTrainedModel):
    """A label for each token."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.model = PlugLMModel(config)
        self.dropout = _dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> PlugLMTokenOutput:
        """Logits `[B, T, C]`; labels `[B, T]`, -100 where none."""
        encoded = self.model(input_ids, attention_mask, token_type_ids, **options)
        logits_BTC = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else mean_entropy(logits_BTC, labels)
        return PlugLMTokenOutput(
            loss=loss, logits=logits_BTC, hidden_states=encoded.hidden_states, retrieved=encoded.retrieved
        )


class PlugLMForQuestionAnswering(PlugLMPreTrainedModel):
    """Where an answer starts and ends; position 0 says that there is none."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.model = PlugLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Any,
    ) -> PlugLMAnswerOutput:
        """Logits `[B, T]` of starts and ends; padding is never one."""
        encoded = self.model(input_ids, attention_mask, token_type_ids, **options)
        logits_BT2 = self.qa_outputs(encoded.last_hidden_state).float()
        if attention_mask is not None:
            logits_BT2 = logits_BT2.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(torch.float32).min)
        start_BT, end_BT = logits_BT2.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start_BT, start_positions) + F.cross_entropy(end_BT, end_positions)) / 2
        return PlugLMAnswerOutput(
            loss=loss, start_logits=start_BT, end_logits=end_BT, hidden_states=encoded.hidden_states,
            retrieved=encoded.retrieved,
        )  # fmt: skip


AutoModelForSequenceClassification.register(PlugLMConfig, PlugLMForSequenceClassification)
AutoModelForTokenClassification.register(PlugLMConfig, PlugLMForTokenClassification)
AutoModelForQuestionAnswering.register(PlugLMConfig, PlugLMForQuestionAnswering)
