"""Quantised PLMs: transformers' configs from settings, and which weights of a loaded model are quantised."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pema_ray.errors import UserError, nearest
from pema_ray.runtime.hardware import DTYPES

_BITSANDBYTES = "bitsandbytes"
_BITS = ("load_in_4bit", "load_in_8bit")  # with these, transformers takes bitsandbytes, whatever the method


def quantization_config(settings: Mapping[str, Any]) -> Any:
    """transformers' config (`BitsAndBytesConfig`, `GPTQConfig`, `AwqConfig` …) that `plm.quantization` describes.

    Raises:
        UserError: the method or a setting is unknown, a value does not fit, or the method's package is not installed.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    bits = [name for name in _BITS if settings.get(name)]
    method = settings.get("quant_method", _BITSANDBYTES if bits else None)
    methods = sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING})
    if method not in methods:
        raise UserError(
            f"plm.quantization: quant_method is '{method}', expected one of {', '.join(methods)}."
            f"{nearest(str(method), methods)}"
        )
    if (method == _BITSANDBYTES) != bool(bits):
        needed = "needs" if not bits else "does not take"
        raise UserError(f"plm.quantization: {method} {needed} load_in_4bit: true or load_in_8bit: true.")
    if bits:
        _refuse_unknown(settings)
    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except ModuleNotFoundError as error:
        raise UserError(f"plm.quantization: {method} needs a package: pip install {error.name}") from None
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise UserError(f"plm.quantization: {method}: {(str(error).splitlines() or ['?'])[0]}") from None


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    """transformers ignores unknown keys of bitsandbytes; other methods may read theirs."""
    from transformers import BitsAndBytesConfig

    keys = ["quant_method", *list(inspect.signature(BitsAndBytesConfig.__init__).parameters)[1:]]
    for name in settings:
        if name not in keys:
            raise UserError(f"plm.quantization: unknown key '{name}' of {_BITSANDBYTES}.{nearest(name, keys)}")


def stores_quantized(readable: str, **source: Any) -> bool:
    """Whether a model's folder or hub repository holds quantised weights, as its `config.json` says.

    Args:
        source: the `revision` of a hub repository, unless the newest.
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(readable, **source)
    except (OSError, ValueError):  # no config.json, as in an adapter's folder: loading decides
        return False
    return any("quantization_config" in part for part in (config, config.get("text_config") or {}))


def applies_to_quantized(config: Any) -> bool:
    """Whether transformers applies this config to a checkpoint that is quantised already, as for GPTQ."""
    from transformers.quantizers.auto import LOADING_ATTRIBUTES_CONFIG_TYPES

    return isinstance(config, LOADING_ATTRIBUTES_CONFIG_TYPES)


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers has loaded the model with quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def is_floating_point(weight: Any) -> bool:
    """Whether a weight holds plain numbers in float32, bfloat16 or float16; subclasses of tensors may pack others."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in DTYPES.values()
