"""The encoder-decoder of transformers, its decoder keys read by a hook: the input of the last decoder layer's
feed-forward block. Knows torch and transformers.

Shapes: B sentences, S source and T target positions, N positions of any, H hidden (of states and keys), V words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.model.memory_lm import LMStates
from pema_ray.trime.model.registry import TRANSFORMERS, fingerprint_of
from pema_ray.trime.model.transformers_model import last_feed_forward
from pema_ray.trime.translation.config import MtModelConfig

_FINGERPRINT = "trime_mt.json"


class Translator(nn.Module):
    """A seq2seq model of transformers with its states and keys.

    Raises:
        UserError: the decoder's last feed-forward block is not found, or logits are not the head's of its last state.
    """

    def __init__(self, network: Any, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name
        config = network.config
        self.pad: int = config.pad_token_id
        self.start: int = config.decoder_start_token_id
        self.vocabulary_size = int(network.get_output_embeddings().weight.shape[0])
        self.max_positions: int = getattr(config, "max_position_embeddings", 0) or 1 << 20
        if self.pad is None or self.start is None:
            raise UserError(f"model.name={name}: has no padding or no token that decoding starts with.")
        self._caught: Tensor | None = None
        last_feed_forward(network.get_decoder(), name).register_forward_pre_hook(self._catch)
        self.hidden_size = self._prove()

    def represent(self, source_BS: Tensor, input_BT: Tensor) -> LMStates:
        """States and keys `[B, T, H]` of decoder inputs; position t sees inputs 0 … t and the whole source."""
        encoder = self.network.get_encoder()
        seen_BS = (source_BS != self.pad).long()
        encoded_BSH = encoder(input_ids=source_BS, attention_mask=seen_BS).last_hidden_state
        state_BTH = self.network.get_decoder()(
            input_ids=input_BT, encoder_hidden_states=encoded_BSH, encoder_attention_mask=seen_BS, use_cache=False
        ).last_hidden_state
        return LMStates(state_BTH, self.take_key().view(*input_BT.shape, -1))

    def logits(self, state_NH: Tensor) -> Tensor:
        """E_w · f, and Marian's bias where a checkpoint has one: `[N, V]`."""
        logits_NV = self.network.get_output_embeddings()(state_NH)
        bias = getattr(self.network, "final_logits_bias", None)
        return logits_NV if bias is None else logits_NV + bias

    def take_key(self) -> Tensor:
        """The keys of the decoder's last forward pass; each can be taken once."""
        assert self._caught is not None
        key, self._caught = self._caught, None
        return key

    def _catch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._caught = inputs[0]

    @torch.no_grad()
    def _prove(self) -> int:
        """Check that logits are the head's of the last state, and return the keys' size."""
        was_training = self.training
        self.eval()
        source = torch.tensor([[i for i in range(4) if i != self.pad]])
        start = torch.tensor([[self.start, int(source[0, 0])]])
        state, key = self.represent(source, start)
        expected = self.network(input_ids=source, decoder_input_ids=start, use_cache=False).logits
        self._caught = None
        self.train(was_training)
        if not torch.allclose(self.logits(state).log_softmax(-1), expected.log_softmax(-1), atol=1e-3):
            raise UserError(f"model.name={self.name}: its logits are not its head's of the last state: not supported.")
        return int(key.shape[-1])


def make_translator(config: MtModelConfig, source_words: int, target_words: int, positions: int) -> Translator:
    """A model with weights drawn from torch's generator, or a checkpoint's. Ids 0 and 1 end and pad both sides.

    Args:
        positions: longest source or target, with the tokens that are added to it.
    """
    if config.name.startswith(TRANSFORMERS):
        model = load_checkpoint_model(config.name.removeprefix(TRANSFORMERS), config.name)
        if positions > model.max_positions:
            raise UserError(
                f"data.max_tokens asks for {positions} positions, {config.name} knows {model.max_positions}. Lower it."
            )
        return model
    if config.name != "marian":
        raise UserError(f"model.name={config.name}: it is marian or transformers:<hub name or folder>.")
    from transformers import MarianConfig, MarianMTModel

    c = config
    shape = MarianConfig(
        vocab_size=source_words,
        decoder_vocab_size=target_words,
        share_encoder_decoder_embeddings=False,
        max_position_embeddings=positions,
        encoder_layers=c.encoder_layers,
        decoder_layers=c.decoder_layers,
        d_model=c.hidden_size,
        encoder_ffn_dim=c.ffn_size,
        decoder_ffn_dim=c.ffn_size,
        encoder_attention_heads=c.heads,
        decoder_attention_heads=c.heads,
        dropout=c.dropout,
        attention_dropout=c.attention_dropout,
        activation_dropout=c.activation_dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=c.hidden_size**-0.5,
        eos_token_id=0,
        pad_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return Translator(MarianMTModel(shape), config.name)


def load_checkpoint_model(folder: str, name: str) -> Translator:
    """A seq2seq model from a hub name or a folder.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForSeq2SeqLM

    try:
        return Translator(AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32), name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from None


def save_translator(model: Translator, folder: Path) -> None:
    """Write a folder that transformers reads, its fingerprint last."""
    folder.mkdir(parents=True, exist_ok=True)
    model.network.save_pretrained(folder)
    with atomic_file(folder / _FINGERPRINT) as temporary:
        temporary.write_text(json.dumps({"name": model.name, "fingerprint": fingerprint_of(model)}) + "\n")


def load_translator(folder: Path) -> Translator:
    """A trained model, ready to translate (`eval`), on the CPU.

    Raises:
        UserError: the folder holds none, or one that is damaged.
    """
    fingerprint = read_fingerprint(folder)
    model = load_checkpoint_model(str(folder), str(folder)).eval()
    if fingerprint_of(model) != fingerprint:
        raise UserError(
            f"{folder}: damaged: its weights are not those that were written. Delete "
            f"{folder.parent} and run: pema-ray trime mt-train"
        )
    return model


def read_fingerprint(folder: Path) -> str:
    """The fingerprint in a model's folder, without reading its weights."""
    try:
        return json.loads((folder / _FINGERPRINT).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: holds no trained model. Run: pema-ray trime mt-train") from None
