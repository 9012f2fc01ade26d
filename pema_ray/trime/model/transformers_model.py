"""Any transformers causal LM as a `MemoryLM`: its last feed-forward block's input is read by a hook.

Shapes: B sequences, T positions, H hidden (of keys), N states, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.trime.model.adaptive import full_log_probs, full_score
from pema_ray.trime.model.memory_lm import LMStates, TrainableLM, VocabularyScore

_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1")
_SCALES = {"logit_scale": 1, "logits_scaling": -1}  # cohere multiplies, granite divides
_TOLERANCE = 1e-3


class TransformersLM(TrainableLM):
    """f(c) is what the LM head is given (scaled, where the model scales its logits), g(c) the last block's MLP input.

    Raises:
        UserError: the head has a bias or a soft cap, or logits are not the head's of the last state; it says which.
    """

    def __init__(self, causal: Any, name: str) -> None:
        super().__init__()
        self.causal, self.name = causal, name
        config = causal.config.get_text_config()
        self.max_positions: int = getattr(config, "max_position_embeddings", 0) or 1 << 30
        head = causal.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UserError(f"model.name={name}: an LM head with a bias is not supported.")
        if getattr(config, "final_logit_softcapping", None):
            raise UserError(
                f"model.name={name}: soft-capped logits are not supported: their sum is no softmax of E · f."
            )
        self._scale = 1.0
        for setting, power in _SCALES.items():
            self._scale *= float(getattr(config, setting, None) or 1.0) ** power
        self.vocabulary_size = int(head.weight.shape[0])
        self._caught: Tensor | None = None
        last_feed_forward(causal, name).register_forward_pre_hook(self._catch)
        self.hidden_size = self._prove()

    @classmethod
    def from_pretrained(cls, name: str, fresh: bool, vocabulary_size: int) -> TransformersLM:
        """A hub model or folder; `fresh`: its architecture with random weights and this vocabulary size."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            if fresh:
                config = AutoConfig.from_pretrained(name)
                config.get_text_config().vocab_size = vocabulary_size
                return cls(AutoModelForCausalLM.from_config(config, dtype=torch.float32), name)
            causal = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"model.name={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
        model = cls(causal, name)
        if vocabulary_size > model.vocabulary_size:
            raise UserError(
                f"model.name={name}: knows {model.vocabulary_size:,} tokens, the corpus was prepared with "
                f"{vocabulary_size:,}. Prepare with vocabulary=tokenizer, or train from scratch: model.fresh=true."
            )
        return model

    @classmethod
    def from_described(cls, described: dict[str, Any]) -> TransformersLM:
        """The same model without its weights, from what `described` gave."""
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(described["config"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        return cls(AutoModelForCausalLM.from_config(config, dtype=torch.float32), described["name"])

    @property
    def described(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.causal.config.to_dict()}

    def represent(self, token_BT: Tensor) -> LMStates:
        """States and keys; position t sees tokens 0 … t."""
        base = self.causal.get_decoder()
        state_BTH = base(input_ids=token_BT, use_cache=False).last_hidden_state * self._scale
        assert self._caught is not None
        key, self._caught = self._caught, None
        return LMStates(state_BTH, key.reshape(*token_BT.shape, -1))

    def score(self, state_NH: Tensor, target_N: Tensor) -> VocabularyScore:
        return full_score(state_NH, self.causal.get_output_embeddings().weight, target_N)

    def log_probs(self, state_NH: Tensor) -> tuple[Tensor, Tensor]:
        return full_log_probs(state_NH, self.causal.get_output_embeddings().weight)

    def _catch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._caught = inputs[0]

    @torch.no_grad()
    def _prove(self) -> int:
        """Check that logits are E · f, and return the keys' size."""
        was_training = self.training
        self.eval()
        token_BT = torch.arange(8)[None] % self.vocabulary_size
        state_BTH, key_BTH = self.represent(token_BT)
        expected = self.causal(input_ids=token_BT, use_cache=False).logits.float().log_softmax(-1)[0]
        self._caught = None
        worst = (self.log_probs(state_BTH[0])[0] - expected).abs().max()
        self.train(was_training)
        if not worst < _TOLERANCE:
            raise UserError(
                f"model.name={self.name}: its logits are not its LM head's of the last state: not supported."
            )
        return int(key_BTH.shape[-1])


def last_feed_forward(network: nn.Module, name: str) -> nn.Module:
    """The last layer's feed-forward block: the first of `_FEED_FORWARD` in the last module of the longest list."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    last = max(lists, key=len)[-1] if lists else nn.Identity()
    for attribute in _FEED_FORWARD:
        if isinstance(block := getattr(last, attribute, None), nn.Module):
            return block
    raise UserError(
        f"model.name={name}: no feed-forward block found in {type(last).__name__} (looked for "
        f"{', '.join(_FEED_FORWARD)})."
    )
