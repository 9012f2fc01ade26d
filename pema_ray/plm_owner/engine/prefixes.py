"""Prefixes that data owners have put, kept by owner and handle, and the caches that passes attend to.

n positions, G key-value heads, D head size.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from pema_ray.errors import UserError
from pema_ray.line.prefix import Prefix, PrefixShape
from pema_ray.line.protocol import PrefixLost
from pema_ray.plm_owner.engine.checks import holds_plain_rows, random_ids
from pema_ray.plm_owner.model.load import LoadedPLM


@torch.inference_mode()
def prefix_shape(plm: LoadedPLM) -> PrefixShape | None:
    """What a prefix of this PLM holds of each position; None for a PLM that takes none: its cache holds more than keys
    and values, its layers differ in size, or they lie on several devices."""
    if not holds_plain_rows(plm):
        return None
    cache: Any = DynamicCache(config=plm.model.config)
    plm.decoder(
        input_ids=torch.tensor([random_ids(plm, 1, 0)], device=plm.device), past_key_values=cache, use_cache=True
    )
    shapes = {tuple(rows.shape) for layer in cache.layers for rows in (layer.keys, layer.values)}
    if len(shapes) != 1 or len({layer.keys.device for layer in cache.layers}) != 1:
        return None
    ((_, heads, _, size),) = shapes
    return PrefixShape(len(cache.layers), heads, size)


def prefix_cache(plm: LoadedPLM, prefix: Prefix) -> DynamicCache:
    """A cache that holds a prefix, for one sequence, in the PLM's number format; gradients flow to its embeddings."""
    cache = DynamicCache(config=plm.model.config)
    for number, (keys, values) in enumerate(prefix.keys_and_values()):
        cache.update(keys.to(plm.device, plm.model.dtype), values.to(plm.device, plm.model.dtype), number)
    return cache


def prefix_of_cache(plm: LoadedPLM, cache: Any, tokens: int) -> Prefix:
    """The keys and values that a cache holds of a text, float32.

    Args:
        tokens: of the text.

    Raises:
        UserError: a layer attends to a window that is shorter than the text.
    """
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if any(keys.shape[2] != tokens for keys, _ in layers):
        raise UserError(f"{plm.name}: a text of {tokens} tokens is longer than its layers' windows.")
    exact = plm.model.dtype if plm.model.dtype == torch.float64 else torch.float32
    return Prefix.of([(keys.to("cpu", exact), values.to("cpu", exact)) for keys, values in layers])


class Prefixes:
    """What every data owner has put, the least recently used dropped first.

    Args:
        budget: positions kept for one owner, over all its prefixes; 0: none are taken.
        usable: whether the engine reuses keys and values for extractions and for sessions alike.
        clock: monotonic seconds.

    Attributes:
        shape: of the prefixes that are taken; None: none.
    """

    def __init__(
        self, plm: LoadedPLM, budget: int, usable: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plm, self._budget, self._clock = plm, budget, clock
        self._used: dict[str, float] = {}
        """When each owner has put or used a prefix last."""
        self._kept: dict[str, OrderedDict[str, Prefix]] = {}
        self._starts: dict[str, tuple[tuple[int, ...], Prefix]] = {}
        self.shape = prefix_shape(plm) if usable and budget else None

    def put(self, owner: str, prefix: Prefix) -> None:
        """Keep a copy of a prefix that `check` has let pass; of one with a text, the sum with what `keep_start` got."""
        whole = prefix.replaced(prefix.embeddings.detach().cpu().clone())
        if prefix.text:
            start = self.start_of(owner, prefix.text)
            assert start is not None
            whole = whole.added_to(start)
            largest = torch.finfo(self._plm.model.dtype).max  # a refusal would tell how large the start is
            whole = whole.replaced(whole.embeddings.clamp(-largest, largest))
        self._used[owner] = self._clock()
        kept = self._kept.setdefault(owner, OrderedDict())
        kept[prefix.handle] = whole
        kept.move_to_end(prefix.handle)
        while sum(map(len, kept.values())) > self._budget:
            kept.popitem(last=False)

    def check(self, prefix: Prefix) -> None:
        """Raises UserError if this PLM takes none of this shape, none so long, or none with such numbers."""
        if prefix.shape != self.required_shape:
            raise UserError(f"This prefix is for another PLM: it has {prefix.shape}, {self._plm.name} {self.shape}.")
        self.check_length(len(prefix))
        if not prefix.embeddings.is_floating_point():
            raise UserError(f"A prefix holds floating-point numbers, not {prefix.embeddings.dtype}.")
        if not torch.isfinite(prefix.embeddings.to(self._plm.model.dtype)).all():
            raise UserError(f"A prefix must be finite in {self._plm.model.dtype}: this one holds infinities or NaN.")

    def start_of(self, owner: str, text: tuple[int, ...]) -> Prefix | None:
        """The keys and values of the text to which this owner adds, if it is the last one."""
        last, start = self._starts.get(owner, ((), None))
        return start if last == text else None

    def keep_start(self, owner: str, text: tuple[int, ...], start: Prefix) -> None:
        """Keep the keys and values of the text to which this owner's next prefixes are added."""
        self._starts[owner], self._used[owner] = (text, start), self._clock()

    def forget(self, seconds: float) -> list[str]:
        """Drop all prefixes of owners who have used none for so long, and name them; who comes back puts it again."""
        oldest = self._clock() - seconds
        forgotten = [owner for owner, used in self._used.items() if used < oldest]
        for owner in forgotten:
            for kept in (self._used, self._kept, self._starts):
                kept.pop(owner, None)
        return forgotten

    def check_length(self, positions: int) -> None:
        """Raises UserError if this PLM takes no prefix of so many positions."""
        _ = self.required_shape
        if positions > self._budget:
            raise UserError(f"A prefix of {positions} positions is longer than is kept here ({self._budget}).")

    @property
    def required_shape(self) -> PrefixShape:
        """Raises UserError if this PLM takes no prefix."""
        if self.shape is None:
            raise UserError(
                f"{self._plm.name} takes no prefix: its caches hold more than keys and values of one size, or lie on "
                "several devices, or it decodes one sequence at a time, or engine.prefix_positions is 0."
            )
        return self.shape

    def get(self, owner: str, handle: str) -> Prefix:
        """What this owner has put under a handle.

        Raises:
            PrefixLost: this owner has put none of this name, or it was dropped.
        """
        try:
            self._kept[owner].move_to_end(handle)
            self._used[owner] = self._clock()
            return self._kept[owner][handle]
        except KeyError:
            raise PrefixLost(handle) from None
