"""Representations of whole batches, without sessions, one piece of a batch at a time.

The pieces of a batch depend on the batch and the token budget alone, and different requests never share a forward pass.
So representations are the same bytes whatever else the engine computes, and a memory built twice is byte-identical. A
PLM owner with many small requests may give that up: with `share_passes`, one data owner's requests share passes.
B sequences, T positions, N rows, H hidden, h key-value heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import BACKWARD_TOKENS
from pema_ray.plm_owner.engine.checks import attempt, holds_plain_rows, plain_states, random_ids, same_states
from pema_ray.plm_owner.engine.graphs import Graph, Graphs, measured
from pema_ray.plm_owner.engine.prefixes import prefix_cache, prefix_of_cache
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.states import capture_state

_SHORTEST_PREFIX = 8  # tokens; a shorter one is computed with every sequence
_MAX_PREFIXES = 8  # owners whose last prefix is cached
_GRADIENT_BUDGET = 512  # positions whose graph is kept, at least, if a pass may have as many
_ROWS_OF_PREFIX = 64  # a pass attends to at most this × its budget of prefix positions
_LAYERS_OF_PREFIX = 8  # of such a pass whose copies of the prefix a graph may keep


@dataclass(eq=False)
class _Prefix:
    """What stands before every sequence of a pass: a data owner's prefix, then tokens."""

    handle: str
    ids: tuple[int, ...]
    cache: DynamicCache
    positions: int
    computed: int = 0
    """Of the tokens."""


@dataclass(eq=False)
class ExtractJob:
    """One extraction on its way through the batcher.

    Attributes:
        result: its representations `[N, H]` (of a `ReadJob`, a prefix), or an error; none until then.
    """

    owner: str
    batch: ExtractBatch
    deadline: float
    result: torch.Tensor | Prefix | Exception | None = None
    cancelled: bool = False
    checked: bool = False
    begun: bool = False
    tokens: int = 0
    """Still to compute."""
    owned: Prefix | None = None
    """The data owner's prefix, once it was looked up."""
    _prefix: _Prefix | None = None
    _pieces: list[list[int]] = field(default_factory=list)
    _passes: int = 0
    """That are done."""
    _key: Hashable = None
    """Of the batch, if its passes are differentiated."""
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def needs_graph(self) -> bool:
        """Whether its passes can be differentiated with respect to the data owner's prefix."""
        return self.batch.for_gradient

    def computed(self, i: int) -> Sequence[int]:
        """The tokens of a sequence in a pass: with the prefix, unless its keys and values are reused."""
        cached = 0 if self._prefix is None else len(self._prefix.ids)
        return [*self.batch.prefix[cached:], *self.batch.token_ids[i]]

    def length(self, i: int) -> int:
        """Positions of a sequence in a pass."""
        return len(self.computed(i))


@dataclass(eq=False, kw_only=True)
class GradientJob(ExtractJob):
    """The gradient of a data owner's prefix: the same passes, forward and backward; its result is `[n, width]`.

    Attributes:
        d_state_NH: of the loss, for every representation that the batch asks for.
    """

    d_state_NH: torch.Tensor
    gradient: torch.Tensor | None = None
    """The sum over the pieces so far, float32."""

    @property
    def needs_graph(self) -> bool:
        return True

    def rows(self, i: int) -> slice:
        """A sequence's representations among all."""
        counts = [len(ids) - first for ids, first in zip(self.batch.token_ids, self.batch.first, strict=True)]
        return slice(sum(counts[:i]), sum(counts[: i + 1]))


@dataclass(eq=False)
class ReadJob(ExtractJob):
    """The keys and values of a text, the batch's one sequence; its result is a `Prefix`."""


class Extraction:
    """Computes extractions piece by piece.

    At start it checks against plain forward passes whether sequences may be padded to one batch, and whether a prefix's
    keys and values may be reused.

    Args:
        budget: positions of a piece, padding included; a longer sequence is a piece of its own.
        share_passes: whether pieces of several requests may be computed together.
        graphs: gets those of representations whose gradient is expected; by default none are kept.
    """

    def __init__(self, plm: LoadedPLM, budget: int, share_passes: bool = False, graphs: Graphs | None = None) -> None:
        self._plm, self.budget, self._share_passes = plm, budget, share_passes
        self._graphs = graphs or Graphs(0, 0)
        self._prefixes: OrderedDict[str, _Prefix] = OrderedDict()  # by owner
        self.batches, self.reuses_prefixes = True, holds_plain_rows(plm)
        if self.reuses_prefixes and attempt(self._is_exact):
            self.reuses_prefixes = False
        if not self.reuses_prefixes and attempt(self._is_exact):
            self.batches = False

    def _is_exact(self) -> bool:
        length = min(24, self._plm.max_positions // 2)
        prefix, *sequences = (random_ids(self._plm, n, n) for n in (length, length, max(1, length // 3)))
        job = ExtractJob("", ExtractBatch(sequences, [0, 0], tuple(prefix)), 0)
        self._begin(job)
        job._pieces = [[0, 1]] if self.batches else [[0], [1]]  # whatever the budget
        while job.result is None:
            self.advance([job])
        self._prefixes.clear()
        plain = [plain_states(self._plm, [*prefix, *ids])[len(prefix) :].cpu() for ids in sequences]
        assert isinstance(job.result, torch.Tensor)
        return same_states(self._plm, job.result, torch.cat(plain))

    @torch.inference_mode()
    def advance(self, jobs: Sequence[ExtractJob]) -> tuple[int, int]:
        """Compute the first job's next piece, or a piece of its prefix.

        Args:
            jobs: of one data owner; if passes are shared, the later ones fill the pass.

        Returns:
            The numbers of sequences and positions.
        """
        job = jobs[0]
        if not job.begun:
            self._begin(job)
        prefix = job._prefix
        if prefix is not None and prefix.computed < len(prefix.ids):
            ids = prefix.ids[prefix.computed : prefix.computed + self.budget]
            input_ids = torch.tensor([ids], device=self._plm.device)
            self._plm.decoder(input_ids=input_ids, past_key_values=prefix.cache, use_cache=True)
            prefix.computed += len(ids)
            if isinstance(job, ReadJob):
                self._read(job, prefix, len(ids))
            return 1, len(ids)
        pieces = [(job, job._pieces.pop(0))]
        if job.needs_graph:
            try:
                return self._differentiable(job, pieces[0][1])
            except (RuntimeError, NotImplementedError) as error:  # memory, or a kernel without a backward pass
                job.result = UserError(f"{self._plm.name}: the gradient of a prefix cannot be computed: {error}")
                return len(pieces[0][1]), sum(job.length(i) for i in pieces[0][1])  # what failed is charged too
        if self._share_passes and self.batches:
            self._fill(pieces, jobs[1:])
        positions = self._run(pieces)
        for job, piece in pieces:
            self._finish(job, piece)
        return sum(len(piece) for _, piece in pieces), positions

    def _fill(self, pieces: list[tuple[ExtractJob, list[int]]], jobs: Sequence[ExtractJob]) -> None:
        """Add pieces of other jobs with the same prefix, within the budget."""
        first, piece = pieces[0]
        count, width = len(piece), max(first.length(i) for i in piece)
        limit = self._max_sequences(first)
        for job in jobs:
            if count == limit or (count + 1) * width > self.budget:
                return
            is_plain = type(job) is ExtractJob and job.owned is None and not job.needs_graph
            if not is_plain or job.batch.prefix != first.batch.prefix:
                continue
            if not job.begun:
                self._begin(job)
            if job._prefix is not first._prefix:
                continue
            piece = job._pieces[-1]  # the smallest
            wider = max(width, *(job.length(i) for i in piece))
            if count + len(piece) <= limit and (count + len(piece)) * wider <= self.budget:
                pieces.append((job, job._pieces.pop()))
                count, width = count + len(piece), wider

    def _begin(self, job: ExtractJob) -> None:
        job.begun = True
        ids = job.batch.prefix
        if isinstance(job, ReadJob):
            job._prefix = self._new_prefix(tuple(job.batch.token_ids[0]), job)
            return
        if job.needs_graph:
            job._key = job.batch.key
            # the gradient flows through the tokens before the sequences too
        elif self.reuses_prefixes and len(ids) >= _SHORTEST_PREFIX:
            job._prefix = self._prefix_of(job)
        elif job.owned is not None:
            job._prefix = self._new_prefix((), job)
        lengths = [job.length(i) for i in range(len(job.batch.token_ids))]
        budget = max(_GRADIENT_BUDGET, self.budget // 4) if job.needs_graph else self.budget
        job._pieces = cut(lengths, min(self.budget, budget), self._max_sequences(job) if self.batches else 1)

    def _max_sequences(self, job: ExtractJob) -> int:
        """Of a pass."""
        positions = (0 if job.owned is None else len(job.owned)) if job._prefix is None else job._prefix.positions
        if job.needs_graph:  # a graph keeps the copies of all layers
            positions = positions * self._plm.model.config.num_hidden_layers // _LAYERS_OF_PREFIX
        return max(1, _ROWS_OF_PREFIX * self.budget // positions) if positions else self.budget

    def forget(self, owner: str) -> None:
        """Drop the cached prefix of an owner."""
        self._prefixes.pop(owner, None)

    def _prefix_of(self, job: ExtractJob) -> _Prefix:
        """The owner's last prefix, if it is this job's; owners never share one."""
        prefix, batch = self._prefixes.get(job.owner), job.batch
        if prefix is None or (prefix.handle, prefix.ids) != (batch.handle, batch.prefix):
            prefix = self._prefixes[job.owner] = self._new_prefix(batch.prefix, job)
        self._prefixes.move_to_end(job.owner)
        if len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)
        return prefix

    def _new_prefix(self, ids: tuple[int, ...], job: ExtractJob) -> _Prefix:
        if job.owned is None:
            return _Prefix("", ids, DynamicCache(config=self._plm.model.config), len(ids))
        return _Prefix(job.batch.handle, ids, prefix_cache(self._plm, job.owned), len(job.owned) + len(ids))

    def _read(self, job: ReadJob, prefix: _Prefix, computed: int) -> None:
        """Finish a job whose text is computed."""
        job.tokens -= computed
        if prefix.computed == len(prefix.ids):
            job._prefix = None
            try:
                job.result = prefix_of_cache(self._plm, prefix.cache, len(prefix.ids))
            except UserError as error:
                job.result = error

    def _run(self, pieces: Sequence[tuple[ExtractJob, list[int]]]) -> int:
        prefix = pieces[0][0]._prefix
        sequences = [(job, i) for job, piece in pieces for i in piece]
        states, positions = self._states(sequences, None if prefix is None else prefix.cache)
        _store(sequences, states)
        return positions

    def _finish(self, job: ExtractJob, piece: list[int]) -> None:
        """Count a piece, and end a job whose last it was."""
        job.tokens -= sum(len(job.batch.token_ids[i]) for i in piece)
        if not job._pieces:
            job.result = torch.cat([job._rows[i] for i in range(len(job.batch.token_ids))])
            job._rows, job._prefix = {}, None

    def _states(
        self, sequences: Sequence[tuple[ExtractJob, int]], before: DynamicCache | None
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        """Run sequences in one pass, behind a cache that they share.

        Returns:
            The requested representations `[rows, H]` of each, on the PLM's device, and the positions of the pass.
        """
        computed = [(job, i, job.computed(i)) for job, i in sequences]
        padded = torch.zeros(len(computed), max(len(ids) for _, _, ids in computed), dtype=torch.long)
        requested = torch.zeros(padded.shape, dtype=torch.bool)
        for row, (job, i, ids) in enumerate(computed):
            padded[row, : len(ids)] = torch.tensor(ids)
            requested[row, len(ids) - len(job.batch.token_ids[i]) + job.batch.first[i] : len(ids)] = True
        inputs: dict[str, Any] = {"input_ids": padded.to(self._plm.device), "use_cache": False}
        if before is not None:
            cache: Any = DynamicCache(config=self._plm.model.config)
            cache.layers = [_SharedPrefixLayer(layer, len(computed)) for layer in before.layers]
            inputs |= {"past_key_values": cache, "use_cache": True}
        state_BTH = capture_state(self._plm, **inputs)  # causal: no position attends to the padding on the right
        rows = state_BTH[requested.to(state_BTH.device)].split(requested.sum(-1).tolist())
        return rows, padded.numel()

    def _differentiable(self, job: ExtractJob, piece: list[int]) -> tuple[int, int]:
        """Compute a piece with its graph: for representations, whose graph is kept, or for their gradient."""
        number, job._passes = job._passes, job._passes + 1
        positions = len(piece) * max(job.length(i) for i in piece)
        if isinstance(job, GradientJob):
            graph = self._graphs.take(job.owner, job._key, number)
            forward = 0 if graph else positions
            self._differentiate(job, piece, graph or self._graph(job, piece))
            return len(piece), forward + (BACKWARD_TOKENS - 1) * positions
        graph = self._graph(job, piece)
        counts = [len(job.batch.token_ids[i]) - job.batch.first[i] for i in piece]
        _store([(job, i) for i in piece], graph.state_NH.detach().split(counts))
        self._graphs.keep(job.owner, job._key, number, graph)
        self._finish(job, piece)
        return len(piece), positions

    def _graph(self, job: ExtractJob, piece: list[int]) -> Graph:
        """One pass forward; where memory is short, without the graphs that are kept."""
        try:
            return self._pass(job, piece)
        except torch.OutOfMemoryError:
            if not self._graphs.clear():
                raise
        return self._pass(job, piece)

    def _pass(self, job: ExtractJob, piece: list[int]) -> Graph:
        assert job.owned is not None
        with torch.inference_mode(False), torch.enable_grad(), measured(self._plm) as nbytes:
            embeddings = job.owned.embeddings.detach().to(self._plm.device, copy=True).requires_grad_()
            prefix = prefix_cache(self._plm, job.owned.replaced(embeddings))
            states, _ = self._states([(job, i) for i in piece], prefix)
            return Graph(embeddings, torch.cat(states), nbytes() + embeddings.nbytes)

    def _differentiate(self, job: GradientJob, piece: list[int], graph: Graph) -> None:
        """Add the gradient of a piece. Linear in D, so pieces sum."""
        largest = float(job.d_state_NH.abs().max()) or 1.0  # small numbers are no numbers of 16 bits
        with torch.inference_mode(False):
            d_state_NH = torch.cat([job.d_state_NH[job.rows(i)] for i in piece])
            exact_NH = d_state_NH if d_state_NH.dtype == torch.float64 else d_state_NH.float()
            gradient = graph.backward(exact_NH / largest)
        exact = (gradient if gradient.dtype == torch.float64 else gradient.float()) * largest
        job.gradient = exact if job.gradient is None else job.gradient + exact
        job.tokens -= sum(len(job.batch.token_ids[i]) for i in piece)
        if not job._pieces:
            job.result = job.gradient.cpu()


def _store(sequences: Sequence[tuple[ExtractJob, int]], states: Sequence[torch.Tensor]) -> None:
    """Keep the representations of sequences for their jobs' answers."""
    for (job, i), state in zip(sequences, torch.cat(list(states)).cpu().split(list(map(len, states))), strict=True):
        job._rows[i] = state


class _SharedPrefixLayer(DynamicLayer):
    """The keys and values `[1, h, T, D]` of a prefix before those of B sequences, which are not kept.

    Copies of the prefix thus live for one layer at a time.
    """

    _layer_type = None

    def __init__(self, prefix: Any, rows: int) -> None:
        super().__init__()
        self._prefix, self._rows, self.is_sliding = prefix, rows, prefix.is_sliding

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        keys, values = (cached.expand(self._rows, -1, -1, -1) for cached in (self._prefix.keys, self._prefix.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._prefix.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._prefix.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return self._prefix.get_max_length()


def cut(lengths: Sequence[int], budget: int, limit: int) -> list[list[int]]:
    """Sequences by falling length, in pieces of at most `budget` positions, padding included, and `limit` sequences.

    A sequence longer than the budget is a piece of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    pieces, begin = [], 0
    while begin < len(order):
        end = begin + max(1, min(limit, budget // lengths[order[begin]]))
        pieces.append(order[begin:end])
        begin = end
    return pieces
