"""Start-up checks: the engine computes states only in ways that agree with plain forward passes. B, T, H as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.proof import UNSUPPORTED
from pema_ray.plm_owner.model.states import capture_state


def attempt(check: Callable[[], bool]) -> str | None:
    """Why a check fails, None if it passes; a model that raises does not support this way."""
    try:
        return None if check() else "the states differ"
    except UNSUPPORTED as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def holds_plain_rows(plm: LoadedPLM) -> bool:
    """Whether the cache holds keys and values alone, of all positions or a window, apart from other sequences."""
    if _depends_on_other_sequences(plm):
        return False
    layers = DynamicCache(config=plm.model.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _depends_on_other_sequences(plm: LoadedPLM) -> bool:
    """Whether a state depends on the longest sequence of its pass, if that exceeds a window (GPT-Neo, Doge).

    Probes are shorter than such windows, so they cannot show it.
    """
    config = plm.model.config.get_text_config()
    return "local" in (getattr(config, "attention_layers", None) or ()) or hasattr(config, "keep_window_size")


def random_ids(plm: LoadedPLM, length: int, seed: int) -> list[int]:
    """Token ids that the model embeds."""
    vocabulary = plm.model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def plain_states(plm: LoadedPLM, ids: Sequence[int]) -> torch.Tensor:
    """States `[T, H]` of a sequence alone, without a cache."""
    return capture_state(plm, input_ids=torch.tensor([ids], device=plm.device), use_cache=False)[0]


def same_states(plm: LoadedPLM, states: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether states `[N, H]` differ only by rounding, on average and at every position.

    Layers with quantised weights may round activations to fewer bits than the states have.
    """
    is_exact = expected.dtype == torch.float32 and not plm.is_quantized
    average, worst = (1e-3, 1e-3) if is_exact else (0.1, 0.5)
    expected = expected.float().to(states.device)
    gap_N = (states.float() - expected).abs().mean(-1) / expected.abs().mean().clamp_min(1e-6)
    return bool(gap_N.mean() <= average) and bool(gap_N.max() <= worst)  # NaN is neither
