"""Models by name: the published shapes, the configured decoder, any transformers model; kept as safetensors and JSON.

A model's folder holds `config.json` (how to build it again, and its fingerprint) and `model.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn

from pema_ray.errors import UserError, nearest
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import DecoderShape, ModelConfig
from pema_ray.trime.model.decoder import DecoderLM
from pema_ray.trime.model.memory_lm import TrainableLM

TRANSFORMERS = "transformers:"
_CONFIG, _TENSORS = "config.json", "model.safetensors"
_PUBLISHED_DROPOUT: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1}
_WIKITEXT: dict[str, Any] = {"layers": 16, "cutoffs": (20_000, 60_000), **_PUBLISHED_DROPOUT}

PUBLISHED: dict[str, DecoderShape] = {
    "247m": DecoderShape(
        **_WIKITEXT, hidden_size=1024, ffn_size=4096, heads=8, factor=4, tail_dropout=0.2, final_norm=False
    ),
    # Published without --tie-adaptive-proj: the softmax has maps of its own.
    "150m": DecoderShape(**_WIKITEXT, hidden_size=410, ffn_size=2100, heads=10, tie_projections=False),
    "enwik8-38m": DecoderShape(
        layers=12, hidden_size=512, ffn_size=2048, heads=8, cutoffs=(208,), **_PUBLISHED_DROPOUT
    ),
    "7m": DecoderShape(
        **{**_WIKITEXT, "layers": 8}, hidden_size=128, ffn_size=512, heads=4, factor=4, tail_dropout=0.2,
        final_norm=False,
    ),
}  # fmt: skip


def shape_of(config: ModelConfig) -> DecoderShape | None:
    """The decoder's shape; none of a transformers model. Raises `UserError` for an unknown name."""
    if config.name.startswith(TRANSFORMERS):
        return None
    if config.name == "decoder":
        return config.shape
    if config.name not in PUBLISHED:
        names = ["decoder", *PUBLISHED]
        raise UserError(
            f"model.name: unknown model '{config.name}'.{nearest(config.name, names)} Known are {', '.join(names)} and "
            f"{TRANSFORMERS}<name or folder>."
        )
    return PUBLISHED[config.name]


def make_model(config: ModelConfig, vocabulary_size: int, segment: int) -> TrainableLM:
    """A model for segments of this many tokens; weights are drawn from torch's generator, or pretrained."""
    shape = shape_of(config)
    if shape is not None:
        return DecoderLM(shape, vocabulary_size, segment)
    from pema_ray.trime.model.transformers_model import TransformersLM

    model = TransformersLM.from_pretrained(config.name.removeprefix(TRANSFORMERS), config.fresh, vocabulary_size)
    if segment > model.max_positions:
        raise UserError(
            f"batches.segment ({segment}) is more than the {model.max_positions} positions that {config.name} knows."
        )
    return model


def save_model(model: TrainableLM, folder: Path) -> None:
    """Write the folder, its `config.json` last."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, DecoderLM):
        settings: dict[str, Any] = {"kind": "decoder", "shape": model.shape.model_dump(mode="json")}
    else:
        from pema_ray.trime.model.transformers_model import TransformersLM

        assert isinstance(model, TransformersLM)
        settings = {"kind": "transformers", "transformers": model.described}
    settings |= {"vocabulary_size": model.vocabulary_size, "max_positions": model.max_positions}
    with atomic_file(folder / _TENSORS) as temporary:
        save_tensors(model, str(temporary))
    with atomic_file(folder / _CONFIG) as temporary:
        temporary.write_text(json.dumps({**settings, "fingerprint": fingerprint_of(model)}, indent=2) + "\n")


def load_model(folder: Path) -> TrainableLM:
    """A trained model, ready to evaluate (`eval`), on the CPU.

    Raises:
        UserError: the folder holds none, or one that is damaged.
    """
    try:
        settings = json.loads((folder / _CONFIG).read_text())
        if settings["kind"] == "decoder":
            shape = DecoderShape.model_validate(settings["shape"])
            model: TrainableLM = DecoderLM(shape, settings["vocabulary_size"], settings["max_positions"])
        else:
            from pema_ray.trime.model.transformers_model import TransformersLM

            model = TransformersLM.from_described(settings["transformers"])
        load_tensors(model, folder / _TENSORS)
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no trained model. Run: pema-ray trime train") from None
    except (ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: not a readable model: {str(error).splitlines()[0]}") from None
    return model.eval()


def read_fingerprint(folder: Path) -> str:
    """The fingerprint in a model's folder, without reading its weights."""
    try:
        return json.loads((folder / _CONFIG).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: holds no trained model. Run: pema-ray trime train") from None


def fingerprint_of(model: nn.Module) -> str:
    """16 hex digits of all weights: keys of one model are no memory for another."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def count_parameters(model: nn.Module) -> int:
    """Of the trainable ones: a table of sinusoidal positions is none."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
