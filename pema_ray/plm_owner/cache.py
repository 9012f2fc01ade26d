"""Key-value caches of decoding sessions. B sequences, h key-value heads, T positions, D head size.

transformers' dynamic cache copies itself at every token; this one grows by a quarter at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 0.25  # of the positions held, set aside whenever a layer is copied


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose tensors are views `[B, h, T, D]` of buffers with room for more positions."""

    _layer_type = None
    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, h, t, D]` keys and values; returns all of them."""
        held, total = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not held:
            self.lazy_initialization(key_states, value_states)
        if self._buffers is None or not self._holds_views_of(self._buffers) or total > self._buffers[0].shape[-2]:
            capacity = total + int(total * _ROOM)
            keys, values = (
                self._roomy(key_states, self.keys, capacity),
                self._roomy(value_states, self.values, capacity),
            )
            self._buffers = keys, values
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., held:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows; where as many stay as there were, only those that move are copied (beams mostly stay)."""
        if self._buffers is None or not self._holds_views_of(self._buffers) or len(indices) != len(self._buffers[0]):
            super().batch_select_indices(indices)
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for held in (self.keys, self.values):
            assert held is not None
            held[moved] = held[indices[moved]]

    def join(self, other: DynamicLayer, mine: int, theirs: int) -> None:
        """Take in another layer's rows, below mine; of each the last so many positions, aligned at their end."""
        total = max(mine, theirs)
        buffers = []
        for held, new in ((self.keys, other.keys), (self.values, other.values)):
            assert held is not None
            assert new is not None
            rows, (heads, _, size) = len(held) + len(new), held.shape[1:]
            buffer = held.new_zeros(rows, heads, total + int(total * _ROOM), size)  # zeros: masked, but never NaN
            buffer[: len(held), :, total - mine : total] = held[..., held.shape[-2] - mine :, :]
            buffer[len(held) :, :, total - theirs : total] = new[..., new.shape[-2] - theirs :, :]
            buffers.append(buffer)
        self._buffers = buffers[0], buffers[1]
        self.keys, self.values = (buffer[..., :total, :] for buffer in buffers)

    def _holds_views_of(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Selecting or repeating rows puts new tensors in the place of the views."""
        assert self.keys is not None
        return self.keys.data_ptr() == buffers[0].data_ptr() and self.keys.shape[0] == buffers[0].shape[0]

    @staticmethod
    def _roomy(like: torch.Tensor, held: torch.Tensor | None, capacity: int) -> torch.Tensor:
        batch, heads, _, size = like.shape
        buffer = like.new_empty(batch, heads, capacity, size)
        if held is not None and held.numel():
            buffer[..., : held.shape[-2], :] = held
        return buffer


def growing_cache(model_config: Any) -> DynamicCache:
    """A cache for `model_config`'s layers; sliding windows and the like stay transformers' own."""
    cache = DynamicCache(config=model_config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def attends_to_everything(cache: DynamicCache) -> bool:
    """Whether every layer keeps all positions, so that padding may lie between them."""
    return all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers)
