"""The context representation: the last hidden state before the final norm. B sequences, T positions, H hidden."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from pema_ray.errors import UserError
from pema_ray.plm_owner.load import LoadedPLM

# Where transformers' decoders keep the norm after their last layer, innermost decoder first.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "ln_out", "embedding_norm")


def find_final_norm(plm: LoadedPLM) -> nn.Module | None:
    """The norm between the last layer and the LM head; None for a model that has none (OPT-350m).

    Raises:
        UserError: no place where such a norm is kept is known for this architecture.
    """
    decoder = _innermost_decoder(plm.decoder)
    for name in _FINAL_NORMS:
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise UserError(f"{plm.name}: cannot find the final norm of {type(decoder).__name__}; not supported.")


def _innermost_decoder(module: nn.Module) -> nn.Module:
    """OPT wraps its decoder once more, multimodal models keep theirs under `language_model`."""
    for name in ("decoder", "language_model"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module) and not isinstance(inner, nn.ModuleList):
            return _innermost_decoder(inner)
    return module


def capture_state(plm: LoadedPLM, **inputs: Any) -> torch.Tensor:
    """Run the decoder and return the state that enters its final norm, `[B, T, H]`; no logits are computed."""
    norm = find_final_norm(plm)
    if norm is None:
        return plm.decoder(**inputs).last_hidden_state
    captured: list[torch.Tensor] = []
    thread = threading.get_ident()

    def capture(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:  # engines may share a loaded PLM
            captured.append(args[0])

    hook = norm.register_forward_pre_hook(capture)
    try:
        plm.decoder(**inputs)
    finally:
        hook.remove()
    return captured[-1]
