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

# Our head's parts → where each family keeps them.
_BERT_HEAD = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
}
_ROBERTA_HEAD = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "decoder": "lm_head.decoder"}
_ELECTRA_HEAD = {
    "dense": "generator_predictions.dense",
    "norm": "generator_predictions.LayerNorm",
    "decoder": "generator_lm_head",
}
_HEADS: dict[str, dict[str, str]] = {
    "bert": _BERT_HEAD,
    "roberta": _ROBERTA_HEAD,
    "xlm-roberta": _ROBERTA_HEAD,
    "camembert": _ROBERTA_HEAD,
    "electra": _ELECTRA_HEAD,
}


def load_pluglm(folder: str | Path, kind: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) that `save_pretrained` left in a folder.

    Args:
        kind: the model's class; by default `PlugLMForMaskedLM`.

    Raises:
        UserError: the folder holds no PlugLM model.
    """
    from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM

    transformers_logging.disable_progress_bar()  # a small model is loaded before a bar is seen
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
    given: Any = AutoModelForMaskedLM.from_pretrained(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = kind(PlugLMConfig(backbone=config.to_dict(), **settings))  # pyright: ignore[reportCallIssue]
    wanted = made.config.memory_feed_forward == config.intermediate_size
    first = made.config.num_hidden_layers - made.config.memory_layers
    ordinary = _renamed(given.base_model.state_dict(), first, wanted)
    left_out = made.model.backbone.load_state_dict(ordinary, strict=False)
    assert not left_out.unexpected_keys, left_out.unexpected_keys
    assert all(_is_new(key, first) for key in left_out.missing_keys), left_out.missing_keys
    head = given.state_dict()
    for ours, theirs in _HEADS[config.model_type].items():
        part = getattr(made.head, ours)
        part.load_state_dict({which: head[f"{theirs}.{which}"] for which in part.state_dict()})
    made.tie_weights()
    return made


def _renamed(state: Mapping[str, Tensor], first: int, with_feed_forward: bool) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names of memory layers, from layer `first` on."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("pooler."):
            continue
        *before, rest = name.split(".", 3) if name.startswith("encoder.layer.") else [name]
        if before and int(before[2]) >= first:
            if rest.startswith("output.LayerNorm."):
                rest = rest.replace("output.LayerNorm.", "norm.")
            elif rest.startswith(("intermediate.dense.", "output.dense.")):
                if not with_feed_forward:
                    continue
                rest = rest.replace("intermediate.dense.", "feed_forward.0.").replace(
                    "output.dense.", "feed_forward.2."
                )
        found[".".join([*before, rest])] = tensor
    return found


def _is_new(key: str, first: int) -> bool:
    """Whether a missing tensor is one that only a memory layer has."""
    parts = key.split(".")
    return (
        parts[:2] == ["encoder", "layer"]
        and int(parts[2]) >= first
        and parts[3] in ("feed_forward", "pooler", "query", "query_norm", "knowledge")
    )
