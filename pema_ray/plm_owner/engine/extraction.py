"""Representations of whole batches, without sessions, one piece of a batch at a time.

How a batch is cut into pieces depends on the batch and the token budget alone, and sequences of different requests
never share a forward pass. So its representations are the same bytes whatever else the engine computes, and a memory
that is built twice is byte-identical. B sequences, T positions, N rows, H hidden, h key-value heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pema_ray.line import ExtractBatch
from pema_ray.plm_owner.engine.checks import attempt, holds_plain_rows, plain_states, random_ids, same_states
from pema_ray.plm_owner.load import LoadedPLM
from pema_ray.plm_owner.states import capture_state

_SHORTEST_PREFIX = 8  # tokens; a shorter one is computed with every sequence
_KEPT_PREFIXES = 8  # owners whose last prefix is kept
_ROWS_OF_PREFIX = 64  # a pass attends to at most so many times its budget of prefix positions


@dataclass(eq=False)
class _Prefix:
    ids: tuple[int, ...]
    cache: DynamicCache
    computed: int = 0


@dataclass(eq=False)
class ExtractJob:
    """One extraction on its way through the batcher.

    Attributes:
        result: its representations `[N, H]`, or why there are none; none until then.
    """

    owner: str
    batch: ExtractBatch
    deadline: float
    result: torch.Tensor | Exception | None = None
    cancelled: bool = False
    checked: bool = False
    begun: bool = False
    tokens: int = 0
    """Not yet computed."""
    _prefix: _Prefix | None = None
    _pieces: list[list[int]] = field(default_factory=list)
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)


class Extraction:
    """Computes extractions piece by piece.

    At start it tries whether sequences may be padded to one batch, and whether a prefix's keys and values may be
    reused; what does not give the states of plain forward passes is not done.

    Args:
        budget: positions of a piece, padding included; a longer sequence is a piece of its own.
    """

    def __init__(self, plm: LoadedPLM, budget: int) -> None:
        self._plm, self.budget = plm, budget
        self._prefixes: OrderedDict[str, _Prefix] = OrderedDict()
        self.batches, self.reuses_prefixes = True, holds_plain_rows(plm)
        if self.reuses_prefixes and not attempt(self._is_exact):
            self.reuses_prefixes = False
        if not self.reuses_prefixes and not attempt(self._is_exact):
            self.batches = False

    def _is_exact(self) -> bool:
        length = min(24, self._plm.max_positions // 2)
        prefix, *sequences = (random_ids(self._plm, n, n) for n in (length, length, max(1, length // 3)))
        job = ExtractJob("", ExtractBatch(sequences, [0, 0], tuple(prefix)), 0)
        self._begin(job)
        job._pieces = [[0, 1]] if self.batches else [[0], [1]]  # whatever the budget
        while job.result is None:
            self.advance(job)
        self._prefixes.clear()
        plain = [plain_states(self._plm, [*prefix, *ids])[len(prefix) :].cpu() for ids in sequences]
        assert isinstance(job.result, torch.Tensor)
        return same_states(job.result, torch.cat(plain))

    @torch.inference_mode()
    def advance(self, job: ExtractJob) -> tuple[int, int]:
        """Compute the next piece, or a piece of the prefix; returns how many sequences and positions that were."""
        if not job.begun:
            self._begin(job)
        prefix = job._prefix
        if prefix is not None and prefix.computed < len(prefix.ids):
            ids = prefix.ids[prefix.computed : prefix.computed + self.budget]
            input_ids = torch.tensor([ids], device=self._plm.device)
            self._plm.decoder(input_ids=input_ids, past_key_values=prefix.cache, use_cache=True)
            prefix.computed += len(ids)
            return 1, len(ids)
        piece = job._pieces.pop(0)
        positions = self._run(job, piece)
        job.tokens -= sum(len(job.batch.token_ids[i]) for i in piece)
        if not job._pieces:
            job.result = torch.cat([job._rows[i] for i in range(len(job.batch.token_ids))])
            job._rows, job._prefix = {}, None
        return len(piece), positions

    def _begin(self, job: ExtractJob) -> None:
        job.begun = True
        prefix, room = job.batch.prefix, self.budget
        reused = self.reuses_prefixes and len(prefix) >= _SHORTEST_PREFIX
        job._prefix = self._prefix_of(job.owner, prefix) if reused else None
        whole = 0 if reused else len(prefix)
        lengths = [whole + len(ids) for ids in job.batch.token_ids]
        most = _ROWS_OF_PREFIX * room // len(prefix) if reused else len(lengths)
        job._pieces = cut(lengths, room, max(1, most) if self.batches else 1)

    def _prefix_of(self, owner: str, ids: tuple[int, ...]) -> _Prefix:
        kept = self._prefixes.get(owner)
        if kept is None or kept.ids != ids:  # one owner's prefix is never looked up for another
            kept = self._prefixes[owner] = _Prefix(ids, DynamicCache(config=self._plm.model.config))
        self._prefixes.move_to_end(owner)
        if len(self._prefixes) > _KEPT_PREFIXES:
            self._prefixes.popitem(last=False)
        return kept

    def _run(self, job: ExtractJob, piece: Sequence[int]) -> int:
        batch, prefix = job.batch, job._prefix
        before = () if prefix is not None else batch.prefix
        sequences = [[*before, *batch.token_ids[i]] for i in piece]
        padded = torch.zeros(len(piece), max(map(len, sequences)), dtype=torch.long)
        requested = torch.zeros(padded.shape, dtype=torch.bool)
        for row, (i, ids) in enumerate(zip(piece, sequences, strict=True)):
            padded[row, : len(ids)] = torch.tensor(ids)
            requested[row, len(before) + batch.first[i] : len(ids)] = True
        inputs: dict[str, Any] = {"input_ids": padded.to(self._plm.device), "use_cache": False}
        if prefix is not None:
            cache: Any = DynamicCache(config=self._plm.model.config)
            cache.layers = [_SharedPrefixLayer(layer, len(piece)) for layer in prefix.cache.layers]
            inputs |= {"past_key_values": cache, "use_cache": True}
        state_BTH = capture_state(self._plm, **inputs)  # causal: no position attends to the padding on the right
        rows = state_BTH[requested.to(state_BTH.device)].cpu().split(requested.sum(-1).tolist())
        job._rows |= dict(zip(piece, rows, strict=True))
        return padded.numel()


class _SharedPrefixLayer(DynamicLayer):
    """The keys and values `[1, h, T, D]` of a prefix before those of B sequences, which are not kept.

    So the copies of the prefix live for one layer at a time.
    """

    _layer_type = None

    def __init__(self, prefix: Any, rows: int) -> None:
        super().__init__()
        self._prefix, self._rows, self.is_sliding = prefix, rows, prefix.is_sliding

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        keys, values = (held.expand(self._rows, -1, -1, -1) for held in (self._prefix.keys, self._prefix.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._prefix.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._prefix.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._prefix.get_max_length()


def cut(lengths: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Sequences by falling length, in pieces of at most `budget` positions, padding included, and `most` sequences.

    A sequence that is longer than the budget is a piece of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    pieces, begin = [], 0
    while begin < len(order):
        end = begin + max(1, min(most, budget // lengths[order[begin]]))
        pieces.append(order[begin:end])
        begin = end
    return pieces
