"""The context representation: the last hidden state before the final norm. B sequences, T positions, H hidden."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from pema_ray.errors import UserError
from pema_ray.plm_owner.model.load import LoadedPLM

# Names of the norm after the last layer in transformers' decoders.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "ln_out", "embedding_norm")


def find_final_norm(plm: LoadedPLM) -> nn.Module | None:
    """The norm between the last layer and the LM head; None for a model that has none (OPT-350m).

    Raises:
        UserError: this architecture keeps its norm under an unknown name.
    """
    decoder = _innermost_decoder(plm.decoder)
    for name in _FINAL_NORMS:
        if hasattr(decoder, name):
            return getattr(decoder, name)
    raise UserError(f"{plm.name}: cannot find the final norm of {type(decoder).__name__}; not supported.")


def _innermost_decoder(module: nn.Module) -> nn.Module:
    """The decoder inside wrappers: OPT has one more, multimodal models keep theirs under `language_model`."""
    for name in ("decoder", "language_model"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module) and not isinstance(inner, nn.ModuleList):
            return _innermost_decoder(inner)
    return module


def capture_state(plm: LoadedPLM, **inputs: Any) -> torch.Tensor:
    """Run the decoder and return the state that enters its final norm, `[B, T, H]`; no logits are computed."""
    state_BTH, _output = _capture(plm, plm.decoder, inputs)
    return state_BTH


def capture_state_and_logits(plm: LoadedPLM, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that enters the final norm, `[B, T, H]`, and the logits `[B, T, V]` that the PLM computes from it."""
    state_BTH, output = _capture(plm, plm.model, inputs)
    return state_BTH, output.logits


def _capture(plm: LoadedPLM, module: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    norm = find_final_norm(plm)
    captured: list[torch.Tensor] = []
    thread = threading.get_ident()

    def before_norm(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:  # engines may share a loaded PLM
            captured.append(args[0])

    def after_decoder(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            captured.append(output.last_hidden_state)

    if norm is None:
        hook = _innermost_decoder(plm.decoder).register_forward_hook(after_decoder)
    else:
        hook = norm.register_forward_pre_hook(before_norm)
    try:
        output = module(**inputs)
    finally:
        hook.remove()
    return captured[-1], output
