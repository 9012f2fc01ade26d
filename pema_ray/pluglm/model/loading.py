"""Loads saved PlugLM models, and makes new ones around a BERT-family checkpoint. Knows transformers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pema_ray.errors import UserError
from pema_ray.pluglm.model.config import BACKBONES, PlugLMConfig

Model = TypeVar("Model")

# Names of the head's parts (dense, norm, decoder) in each family's checkpoints.
_HEADS: dict[str, tuple[str, str, str]] = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert"), ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
    ),
}


def load_pluglm(folder: str | Path, kind: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder that `save_pretrained` wrote.

    Args:
        kind: the model's class; by default `PlugLMForMaskedLM`.

    Raises:
        UserError: the folder holds no PlugLM model.
    """
    from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM

    transformers_logging.disable_progress_bar()  # small models load at once
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no PlugLM model here (config.json is missing).")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "pluglm":
            raise UserError(f"{folder}: a '{config.model_type}' model, no PlugLM; begin with one by model.backbone.")
        model = (kind or PlugLMForMaskedLM).from_pretrained(folder)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None


def load_tokenizer(name: str | Path) -> Any:
    """A tokenizer by hub name or folder. Raises `UserError` if it cannot be read, or has no mask token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no tokenizer that transformers can read: {str(error).splitlines()[0]}") from None
    if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise UserError(f"{name}: PlugLM needs a fast tokenizer with a mask token and a padding token.")
    return tokenizer


def load_backbone(kind: type[Model], name: str, seed: int, settings: Mapping[str, Any]) -> Model:
    """A model of `kind` (`PlugLMForMaskedLM`) around the checkpoint `name`.

    Layers before the memory layers, attention and norms of these, embeddings and head are the checkpoint's. So is the
    parallel feed-forward network if it has the width of the checkpoint's own.

    Raises:
        UserError: the checkpoint cannot be read or is not of the BERT family.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no checkpoint that transformers can read: {str(error).splitlines()[0]}") from None
    if config.model_type not in BACKBONES:
        raise UserError(f"{name}: '{config.model_type}' is not of the BERT family; use {', '.join(BACKBONES)}.")
    checkpoint: Any = AutoModelForMaskedLM.from_pretrained(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = kind(PlugLMConfig(backbone=config.to_dict(), **settings))  # pyright: ignore[reportCallIssue]
    with_feed_forward = model.config.memory_feed_forward == config.intermediate_size
    first = model.config.num_hidden_layers - model.config.memory_layers
    tensors = _renamed(checkpoint.base_model.state_dict(), first, with_feed_forward)
    result = model.model.backbone.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(_is_new(key, first) for key in result.missing_keys), result.missing_keys
    tensors = checkpoint.state_dict()
    for part, prefix in zip((model.head.dense, model.head.norm, model.head.decoder), _HEADS[config.model_type]):
        part.load_state_dict({name: tensors[f"{prefix}.{name}"] for name in part.state_dict()})
    model.tie_weights()
    return model


def _renamed(state: Mapping[str, Tensor], first: int, with_feed_forward: bool) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of memory layers, from layer `first` on."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("pooler."):
            continue
        *layer, rest = name.split(".", 3) if name.startswith("encoder.layer.") else [name]
        if layer and int(layer[2]) >= first:
            if rest.startswith("output.LayerNorm."):
                rest = rest.replace("output.LayerNorm.", "norm.")
            elif rest.startswith(("intermediate.dense.", "output.dense.")):
                if not with_feed_forward:
                    continue
                rest = rest.replace("intermediate.dense.", "feed_forward.0.").replace(
                    "output.dense.", "feed_forward.2."
                )
        renamed[".".join([*layer, rest])] = tensor
    return renamed


def _is_new(key: str, first: int) -> bool:
    """Whether only a memory layer has this tensor."""
    parts = key.split(".")
    return (
        parts[:2] == ["encoder", "layer"]
        and int(parts[2]) >= first
        and parts[3] in ("feed_forward", "pooler", "query", "query_norm", "knowledge")
    )
