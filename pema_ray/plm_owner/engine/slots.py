"""Key-value caches of many sequences: one forward pass takes any of them, at any position.

A slot holds one sequence. Its keys and values lie in positions `0 … length-1` of its own row, so a sequence can join,
continue, be cut or leave without computing or moving anything for the others. S slots, h key-value heads, T positions,
D head size, B rows of a pass, n new tokens, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pema_ray.errors import UserError
from pema_ray.line.prefix import Prefix
from pema_ray.plm_owner.engine.checks import attempt, holds_plain_rows, plain_states, random_ids, same_states
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.states import capture_state

_FIRST_POSITIONS = 128  # of a slot, before it grows
_GROWTH = 1.5
_LONGEST_SINGLY = 16  # tokens; recomputing the whole sequence is faster than more passes of one token
_IDLE_SHARE = 0.25  # of a pass may be unused rows, if that avoids copying the caches


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """Tokens to run on in one slot.

    Attributes:
        start: positions before these tokens; the slot forgets any later ones.
    """

    slot: int
    start: int
    tokens: Sequence[int]


class Caches(Protocol):
    """The caches of all slots of a PLM."""

    def run(self, feeds: Sequence[SlotTokens]) -> list[torch.Tensor]:
        """States `[len(tokens), H]` of every feed, on the PLM's device. No slot occurs twice."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin as the first positions of another."""
        ...

    def load(self, slot: int, prefix: Prefix) -> None:
        """Let a slot begin with a data owner's prefix."""
        ...

    def clear(self, slot: int, start: int) -> None:
        """Zero a slot from a position on."""
        ...


def make_caches(plm: LoadedPLM, slots: int, max_positions: int) -> Caches:
    """Caches for this PLM, of `max_positions` a slot.

    Sequences are batched if the types of the cache's layers allow it and a start-up check passes; otherwise they run
    singly, in pieces or token by token.

    Raises:
        UserError: the PLM gives other states with a cache than without, in every way tried.
    """
    ways: list[Callable[[int], Caches]] = [partial(SeparateCaches, plm), partial(SeparateCaches, plm, one_token=True)]
    config = plm.model.config.get_text_config()
    # flash and flex kernels take no masks of four dimensions
    takes_masks = getattr(config, "_attn_implementation", None) in (None, "eager", "sdpa")
    if takes_masks and holds_plain_rows(plm) and "position_ids" in inspect.signature(plm.decoder.forward).parameters:
        several_kinds = getattr(config, "layer_types", None) is not None
        batched = partial(SlotCaches, plm, max_positions=max_positions)
        ways = [partial(batched, by_kind=several_kinds), partial(batched, by_kind=not several_kinds), *ways]
    reason: str | None = None
    for way in ways:
        if (reason := attempt(lambda way=way: _same_as_plain(plm, way(4)))) is None:
            return way(slots)
    raise UserError(
        f"{plm.name}: {type(plm.model).__name__} gives other states with a cache than without, or none ({reason}); "
        "not supported."
    )


@torch.inference_mode()
def _same_as_plain(plm: LoadedPLM, caches: Caches) -> bool:
    """Compare two sequences, in pieces, one of them rewound and continued, with plain passes."""
    length = min(48, plm.max_positions)
    long, short = random_ids(plm, length, 0), random_ids(plm, max(2, length // 3), 1)
    half = length // 2
    first = caches.run([SlotTokens(0, 0, long[:half]), SlotTokens(2, 0, short)])
    caches.run([SlotTokens(2, len(short) - 1, long[:1])])
    second = caches.run([SlotTokens(2, len(short) - 1, short[-1:]), SlotTokens(0, half, long[half:-1])])
    third = caches.run([SlotTokens(0, length - 1, long[-1:])])
    long_TH, short_TH = torch.cat([first[0], second[1], third[0]]), torch.cat([first[1][:-1], second[0]])
    return all(same_states(plm, states, plain_states(plm, ids)) for states, ids in ((long_TH, long), (short_TH, short)))


# ── batched ────────────────────────────────────────────────────────────────


@dataclass
class _Pass:
    """The rows and positions of the running pass; shared by all layers."""

    rows: slice | torch.Tensor
    row_B1: torch.Tensor
    position_Bn: torch.Tensor
    total: int
    capacity: int
    _copies: dict[torch.device, _Pass] = field(default_factory=dict)

    def on(self, device: torch.device) -> _Pass:
        """The same on a layer's device; each device gets one copy per pass."""
        if device == self.row_B1.device:
            return self
        if device not in self._copies:
            rows = self.rows if isinstance(self.rows, slice) else self.rows.to(device)
            row_B1, position_Bn = self.row_B1.to(device), self.position_Bn.to(device)
            self._copies[device] = _Pass(rows, row_B1, position_Bn, self.total, self.capacity)
        return self._copies[device]


class _SlotLayer(DynamicLayer):
    """One layer's keys and values, `[S, h, T, D]` each; a pass gets only its rows."""

    _layer_type = None

    def __init__(self, slots: int, current: list[_Pass]) -> None:
        super().__init__()
        self._slots, self._current = slots, current

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        current = self._current[0].on(key_states.device)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = self._written(self.keys, key_states, current)
        self.values = self._written(self.values, value_states, current)
        return self.keys[current.rows, :, : current.total], self.values[current.rows, :, : current.total]

    def _written(self, cache_ShTD: torch.Tensor | None, new_BhnD: torch.Tensor, current: _Pass) -> torch.Tensor:
        cache_ShTD = self._grown(cache_ShTD, new_BhnD, current.capacity)
        cache_ShTD[current.row_B1, :, current.position_Bn] = new_BhnD.transpose(1, 2)
        return cache_ShTD

    def _grown(self, cache_ShTD: torch.Tensor | None, new_BhnD: torch.Tensor, capacity: int) -> torch.Tensor:
        """The cache with room for `capacity` positions in each slot."""
        if cache_ShTD is not None and cache_ShTD.shape[2] >= capacity:
            return cache_ShTD
        _, heads, _, size = new_BhnD.shape
        grown = new_BhnD.new_zeros(self._slots, heads, capacity, size)  # masked positions must never be NaN
        if cache_ShTD is not None:
            grown[:, :, : cache_ShTD.shape[2]] = cache_ShTD
        return grown

    def clear(self, slot: int, start: int) -> None:
        for cache_ShTD in (self.keys, self.values):
            if cache_ShTD is not None:
                cache_ShTD[slot, :, start:] = 0

    def load(self, slot: int, keys_1hnD: torch.Tensor, values_1hnD: torch.Tensor, capacity: int) -> None:
        """Let a slot begin with these keys and values."""
        self.keys = self._grown(self.keys, keys_1hnD, capacity)
        self.values = self._grown(self.values, values_1hnD, capacity)
        for cache_ShTD, new_1hnD in ((self.keys, keys_1hnD), (self.values, values_1hnD)):
            cache_ShTD[slot, :, : new_1hnD.shape[2]] = new_1hnD[0]

    def copy(self, source: int, target: int, length: int) -> None:
        for cache_ShTD in (self.keys, self.values):
            if cache_ShTD is not None:
                cache_ShTD[target, :, :length] = cache_ShTD[source, :, :length]

    def get_seq_length(self) -> int:
        return self._current[0].total - self._current[0].position_Bn.shape[1]


class SlotCaches:
    """Caches of S slots, in tensors that all slots share; they grow to the longest sequence.

    Args:
        max_positions: of the longest sequence, without a pass's own padding.
        by_kind: give the model one mask for each kind of layer, as models with several kinds need.
    """

    def __init__(self, plm: LoadedPLM, slots: int, max_positions: int, by_kind: bool) -> None:
        self._plm, self._slots, self._max_positions, self._by_kind = plm, slots, max_positions, by_kind
        self._current: list[_Pass] = []
        self._length = [0] * slots
        self._cache: Any = DynamicCache(config=plm.model.config)
        text = plm.model.config.get_text_config()
        windows = [getattr(layer, "sliding_window", None) for layer in self._cache.layers]
        self._kinds: dict[str, int | None] = dict(zip(getattr(text, "layer_types", None) or [], windows, strict=False))
        self._window = windows[0]
        self._cache.layers = [_SlotLayer(slots, self._current) for _ in windows]
        self._capacity = min(_FIRST_POSITIONS, max_positions)
        self._additive = text._attn_implementation == "eager"

    @torch.inference_mode()
    def run(self, feeds: Sequence[SlotTokens]) -> list[torch.Tensor]:
        slots = self._slots_of_pass(feeds)
        row_of = {slot: row for row, slot in enumerate(slots)}
        width = max(len(feed.tokens) for feed in feeds)
        ids = torch.zeros(len(slots), width, dtype=torch.long)
        start = torch.tensor([self._length[slot] for slot in slots])  # unused rows write behind their own sequence
        for feed in feeds:
            ids[row_of[feed.slot], : len(feed.tokens)] = torch.tensor(list(feed.tokens))
            start[row_of[feed.slot]] = feed.start
        device = self._plm.device
        position = (start[:, None] + torch.arange(width)).to(device)
        total = int(start.max()) + width
        if total > self._capacity:
            self._capacity = max(total, min(int(total * _GROWTH), self._max_positions))
        slot_B = torch.tensor(list(slots), device=device)
        rows = slice(slots.start, slots.stop) if isinstance(slots, range) else slot_B
        self._current[:] = [_Pass(rows, slot_B[:, None], position, total, self._capacity)]
        states = capture_state(
            self._plm,
            input_ids=ids.to(device),
            attention_mask=self._mask(position, total),
            position_ids=position.clamp_max(self._plm.max_positions - 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        for feed in feeds:
            self._length[feed.slot] = feed.start + len(feed.tokens)
        return [states[row_of[feed.slot], : len(feed.tokens)] for feed in feeds]

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self._cache.layers:
            layer.copy(source, target, length)
        self._length[target] = length

    @torch.inference_mode()
    def clear(self, slot: int, start: int) -> None:
        for layer in self._cache.layers:
            layer.clear(slot, start)

    @torch.inference_mode()
    def load(self, slot: int, prefix: Prefix) -> None:
        self._capacity = max(self._capacity, len(prefix))
        for layer, pair in zip(self._cache.layers, prefix.keys_and_values(), strict=True):
            device = self._plm.device if layer.keys is None else layer.keys.device
            keys, values = (rows.to(device, self._plm.model.dtype) for rows in pair)
            layer.load(slot, keys, values, self._capacity)
        self._length[slot] = len(prefix)

    def _slots_of_pass(self, feeds: Sequence[SlotTokens]) -> range | list[int]:
        """A range of slots if most of it is used (a view of the caches), else just these slots (a copy)."""
        slots = sorted(feed.slot for feed in feeds)
        span = range(slots[0], slots[-1] + 1)
        longest = max(feed.start for feed in feeds)
        is_dense = len(span) - len(slots) <= _IDLE_SHARE * len(span)
        return span if is_dense and max(self._length[slot] for slot in span) <= longest + 1 else slots

    def _mask(self, position_Bn: torch.Tensor, total: int) -> Any:
        """The positions that each new token attends to: those before it in its own slot, and itself."""
        key_T = torch.arange(total, device=position_Bn.device)
        query = position_Bn[:, None, :, None]

        def mask(window: int | None) -> torch.Tensor:
            seen = key_T <= query
            if window is not None:
                seen &= key_T > query - window
            if not self._additive:
                return seen
            dtype = self._plm.model.dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

        if self._by_kind:
            return {kind: mask(window) for kind, window in self._kinds.items()}
        return mask(self._window)


# ── singly ──────────────────────────────────────────────────────────────────


class SeparateCaches:
    """One of transformers' own caches for every slot, run singly: for models whose caches hold more than plain rows.

    Such a cache cannot be rewound: the sequence is recomputed.

    Args:
        one_token: continue with one token a pass, for models whose kernels cannot continue with more.
    """

    def __init__(self, plm: LoadedPLM, slots: int, one_token: bool = False) -> None:
        self._plm, self._one_token = plm, one_token
        takes_params = "cache_params" in inspect.signature(plm.decoder.forward).parameters
        self._argument = "cache_params" if takes_params else "past_key_values"  # Mamba's name for its cache
        self._sequences: list[tuple[list[int], DynamicCache | None]] = [([], None)] * slots

    @torch.inference_mode()
    def run(self, feeds: Sequence[SlotTokens]) -> list[torch.Tensor]:
        return [self._one(feed) for feed in feeds]

    def _one(self, feed: SlotTokens) -> torch.Tensor:
        cached, cache = self._sequences[feed.slot]
        tokens, recomputed = list(feed.tokens), 0
        long = self._one_token and len(tokens) > _LONGEST_SINGLY
        if cache is None or len(cached) != feed.start or long:
            tokens, recomputed = [*cached[: feed.start], *tokens], feed.start
            cached, cache = [], DynamicCache(config=self._plm.model.config)
        width = 1 if self._one_token and cached else len(tokens)
        states = [self._forward(tokens[i : i + width], cache) for i in range(0, len(tokens), width)]
        self._sequences[feed.slot] = [*cached, *tokens], cache
        return torch.cat(states)[recomputed:]

    def _forward(self, ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        input_ids = torch.tensor([ids], device=self._plm.device)
        return capture_state(self._plm, input_ids=input_ids, use_cache=True, **{self._argument: cache})[0]

    def copy(self, source: int, target: int, length: int) -> None:
        self._sequences[target] = self._sequences[source][0][:length], None

    def load(self, slot: int, prefix: Prefix) -> None:
        raise UserError(f"{self._plm.name} decodes one sequence at a time, and behind no prefix.")

    def clear(self, slot: int, start: int) -> None:
        """A slot that is opened anew is computed from its first token."""
