"""Key-value caches of many sequences that live side by side: one forward pass takes any of them, wherever they stand.

A slot holds one sequence. Its keys and values lie in positions `0 … length-1` of a row of its own, so a sequence joins,
goes on, is cut short or leaves without anything being computed or moved for the others. S slots, h key-value heads,
T positions, D head size, B rows of a pass, n new tokens, H hidden.
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
from pema_ray.plm_owner.engine.checks import attempt, holds_plain_rows, plain_states, random_ids, same_states
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.states import capture_state

_FIRST_POSITIONS = 128  # of a slot, before it has to grow
_GROWTH = 1.5
_LONGEST_SINGLY = 16  # tokens; to compute the whole sequence again is faster than more passes of one token
_IDLE_SHARE = 0.25  # of a pass may be rows that nobody asked for, where that spares copying the caches


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """Tokens to run on in one slot.

    Attributes:
        start: positions before these tokens; what the slot holds behind them is forgotten.
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


def make_caches(plm: LoadedPLM, slots: int, most: int) -> Caches:
    """Caches for this PLM, of `most` positions a slot.

    Sequences are batched if the types of the cache's layers allow it and a start-up check passes; otherwise they run
    singly, in pieces or token by token.

    Raises:
        UserError: the PLM gives other states with a cache than without, in every way that was tried.
    """
    ways: list[Callable[[int], Caches]] = [
        lambda count: SeparateCaches(plm, count),
        lambda count: SeparateCaches(plm, count, one_token=True),
    ]
    attention = getattr(plm.model.config.get_text_config(), "_attn_implementation", None)
    takes_masks = attention in (None, "eager", "sdpa")  # flash and flex kernels take none of four dimensions
    if takes_masks and holds_plain_rows(plm) and "position_ids" in inspect.signature(plm.decoder.forward).parameters:
        one_kind = getattr(plm.model.config.get_text_config(), "layer_types", None) is None
        for by_kind in (not one_kind, one_kind):
            ways.insert(int(by_kind == one_kind), partial(SlotCaches, plm, most=most, by_kind=by_kind))
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
    """Two sequences of unequal length, in pieces, one of them rewound and continued, against plain passes."""
    length = min(48, plm.max_positions)
    long, short = random_ids(plm, length, 0), random_ids(plm, max(2, length // 3), 1)
    half = length // 2
    first = caches.run([SlotTokens(0, 0, long[:half]), SlotTokens(2, 0, short)])
    caches.run([SlotTokens(2, len(short) - 1, long[:1])])
    second = caches.run([SlotTokens(2, len(short) - 1, short[-1:]), SlotTokens(0, half, long[half:-1])])
    third = caches.run([SlotTokens(0, length - 1, long[-1:])])
    found = [torch.cat([first[0], second[1], third[0]]), torch.cat([first[1][:-1], second[0]])]
    return all(
        same_states(plm, states, plain_states(plm, ids)) for states, ids in zip(found, (long, short), strict=True)
    )


# ── batched ────────────────────────────────────────────────────────────────


@dataclass
class _Pass:
    """Where the rows of the pass that is running lie; shared by all layers."""

    rows: slice | torch.Tensor
    row_B1: torch.Tensor
    position_Bn: torch.Tensor
    total: int
    capacity: int
    _elsewhere: dict[torch.device, _Pass] = field(default_factory=dict)

    def on(self, device: torch.device) -> _Pass:
        """The same for layers on another device; each device gets its copy once a pass."""
        if device == self.row_B1.device:
            return self
        if device not in self._elsewhere:
            rows = self.rows if isinstance(self.rows, slice) else self.rows.to(device)
            row_B1, position_Bn = self.row_B1.to(device), self.position_Bn.to(device)
            self._elsewhere[device] = _Pass(rows, row_B1, position_Bn, self.total, self.capacity)
        return self._elsewhere[device]


class _SlotLayer(DynamicLayer):
    """One layer's keys and values, `[S, h, T, D]` each; a pass sees the rows it asks for."""

    _layer_type = None

    def __init__(self, slots: int, current: list[_Pass]) -> None:
        super().__init__()
        self._slots, self._current = slots, current

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        here = self._current[0].on(key_states.device)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys = self._written(self.keys, key_states, here)
        self.values = self._written(self.values, value_states, here)
        return self.keys[here.rows, :, : here.total], self.values[here.rows, :, : here.total]

    def _written(self, held: torch.Tensor | None, new_BhnD: torch.Tensor, here: _Pass) -> torch.Tensor:
        if held is None or held.shape[2] < here.capacity:
            _, heads, _, size = new_BhnD.shape
            grown = new_BhnD.new_zeros(self._slots, heads, here.capacity, size)  # masked positions must never be NaN
            if held is not None:
                grown[:, :, : held.shape[2]] = held
            held = grown
        held[here.row_B1, :, here.position_Bn] = new_BhnD.transpose(1, 2)
        return held

    def copy(self, source: int, target: int, length: int) -> None:
        for held in (self.keys, self.values):
            if held is not None:
                held[target, :, :length] = held[source, :, :length]

    def get_seq_length(self) -> int:
        return self._current[0].total - self._current[0].position_Bn.shape[1]


class SlotCaches:
    """Caches of S slots, in tensors that all slots share; they grow to the longest sequence.

    Args:
        most: positions of the longest sequence; a pass's own padding comes on top.
        by_kind: hand the model one mask for each kind of layer, as models with several kinds take them.
    """

    def __init__(self, plm: LoadedPLM, slots: int, most: int, by_kind: bool) -> None:
        self._plm, self._slots, self._most, self._by_kind = plm, slots, most, by_kind
        self._current: list[_Pass] = []
        self._length = [0] * slots
        self._cache: Any = DynamicCache(config=plm.model.config)
        text = plm.model.config.get_text_config()
        windows = [getattr(layer, "sliding_window", None) for layer in self._cache.layers]
        self._kinds: dict[str, int | None] = dict(zip(getattr(text, "layer_types", None) or [], windows, strict=False))
        self._window = windows[0]
        self._cache.layers = [_SlotLayer(slots, self._current) for _ in windows]
        self._capacity = min(_FIRST_POSITIONS, most)
        self._additive = text._attn_implementation == "eager"

    @property
    def positions(self) -> int:
        """How many positions each slot has room for at present."""
        return self._capacity

    @torch.inference_mode()
    def run(self, feeds: Sequence[SlotTokens]) -> list[torch.Tensor]:
        order = sorted(range(len(feeds)), key=lambda i: feeds[i].slot)
        chosen = [feeds[i] for i in order]
        width = max(len(feed.tokens) for feed in feeds)
        rows, held = self._rows(chosen)
        device = self._plm.device
        ids = torch.zeros(held, width, dtype=torch.long)
        start = torch.zeros(held, dtype=torch.long)
        place = [feed.slot - rows.start if isinstance(rows, slice) else row for row, feed in enumerate(chosen)]
        for row, feed in zip(place, chosen, strict=True):
            ids[row, : len(feed.tokens)] = torch.tensor(list(feed.tokens))
            start[row] = feed.start
        if isinstance(rows, slice):
            for row in set(range(held)) - set(place):
                start[row] = self._length[rows.start + row]  # who rides along writes where nothing is held
        position = (start[:, None] + torch.arange(width)).to(device)
        total = int(start.max()) + width
        if total > self._capacity:
            self._capacity = max(total, min(int(total * _GROWTH), self._most))
        slots = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        self._current[:] = [_Pass(rows, slots[:, None], position, total, self._capacity)]
        states = capture_state(
            self._plm,
            input_ids=ids.to(device),
            attention_mask=self._mask(position, total),
            position_ids=position.clamp_max(self._plm.max_positions - 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        for feed in chosen:
            self._length[feed.slot] = feed.start + len(feed.tokens)
        found: list[torch.Tensor] = [states] * len(feeds)
        for i, row, feed in zip(order, place, chosen, strict=True):
            found[i] = states[row, : len(feed.tokens)]
        return found

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self._cache.layers:
            layer.copy(source, target, length)
        self._length[target] = length

    def _rows(self, feeds: Sequence[SlotTokens]) -> tuple[slice | torch.Tensor, int]:
        """A stretch of slots where most of it is asked for (a view), else just these (a copy)."""
        slots = [feed.slot for feed in feeds]
        held = slots[-1] + 1 - slots[0]
        longest = max(feed.start for feed in feeds)
        if held - len(slots) <= _IDLE_SHARE * held and max(self._length[slots[0] : slots[-1] + 1]) <= longest + 1:
            return slice(slots[0], slots[-1] + 1), held
        return torch.tensor(slots, device=self._plm.device), len(slots)

    def _mask(self, position_Bn: torch.Tensor, total: int) -> Any:
        """Which positions each new token looks at: those before it in its own slot, and itself."""
        key_T = torch.arange(total, device=position_Bn.device)
        query = position_Bn[:, None, :, None]

        def of(window: int | None) -> torch.Tensor:
            seen = key_T <= query
            if window is not None:
                seen &= key_T > query - window
            if not self._additive:
                return seen
            dtype = self._plm.model.dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

        if self._by_kind:
            return {kind: of(window) for kind, window in self._kinds.items()}
        return of(self._window)


# ── singly ──────────────────────────────────────────────────────────────────


class SeparateCaches:
    """A cache of transformers' own for every slot, run singly: for models whose caches hold more than plain rows.

    Such a cache cannot be rewound: what was before is computed again.

    Args:
        one_token: continue with one token a pass, for models whose kernels cannot continue with more.
    """

    def __init__(self, plm: LoadedPLM, slots: int, one_token: bool = False) -> None:
        self._plm, self._one_token = plm, one_token
        takes_params = "cache_params" in inspect.signature(plm.decoder.forward).parameters
        self._argument = "cache_params" if takes_params else "past_key_values"  # Mamba's name for its cache
        self._held: list[tuple[list[int], DynamicCache | None]] = [([], None)] * slots

    @torch.inference_mode()
    def run(self, feeds: Sequence[SlotTokens]) -> list[torch.Tensor]:
        return [self._one(feed) for feed in feeds]

    def _one(self, feed: SlotTokens) -> torch.Tensor:
        held, cache = self._held[feed.slot]
        tokens, again = list(feed.tokens), 0
        long = self._one_token and len(tokens) > _LONGEST_SINGLY
        if cache is None or len(held) != feed.start or long:
            tokens, again = [*held[: feed.start], *tokens], feed.start
            held, cache = [], DynamicCache(config=self._plm.model.config)
        width = 1 if self._one_token and held else len(tokens)
        states = [self._forward(tokens[i : i + width], cache) for i in range(0, len(tokens), width)]
        self._held[feed.slot] = [*held, *tokens], cache
        return torch.cat(states)[again:]

    def _forward(self, ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        input_ids = torch.tensor([ids], device=self._plm.device)
        return capture_state(self._plm, input_ids=input_ids, use_cache=True, **{self._argument: cache})[0]

    def copy(self, source: int, target: int, length: int) -> None:
        self._held[target] = self._held[source][0][:length], None
