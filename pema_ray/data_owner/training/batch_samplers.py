"""Which rows make up which batch, for every training process. Knows no Ray. N rows, H hidden.

A batch depends on (seed, epoch, index in the epoch) alone, so that a resumed run sees the same batches.

- `GlobalShuffle`: every epoch permutes all rows, which lie in RAM or in the object store. n processes split the batch
  of one; some get a row more than others.
- `StreamShuffle`: the first epoch takes shards as a build produces them.
- `SequenceShuffle`: permutes whole sequences, prompts included, for adapters that look back.
- `WindowShuffle`: a process reads whole shards, in a new order every epoch, and shuffles the rows of a few of them
  together: for memories that fit no process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np

from pema_ray.errors import UserError
from pema_ray.memory.codec import Keys
from pema_ray.runtime.hardware import compute_elsewhere

CHUNK = 8192  # rows per block where no gradient is kept
_SEQUENCE_ROWS = 2048  # the same for whole sequences, which are padded to the longest


class Representations(Protocol):
    """A memory's encoded keys `[N, H]`; indexing decodes, `take` does not."""

    def __getitem__(self, index: np.ndarray | slice, /) -> np.ndarray: ...
    def take(self, index: np.ndarray | slice, /) -> Keys: ...


@runtime_checkable
class Rows(Protocol):
    """What training reads: `key [N, H]`, `target [N]`, and `weight [N]` unless every row counts once."""

    @property
    def key(self) -> Representations: ...
    @property
    def target(self) -> np.ndarray: ...
    @property
    def weight(self) -> np.ndarray | None: ...


class SequenceRows(Rows, Protocol):
    """Rows grouped by sequence and in order.

    Attributes:
        example_id: `[N]`, the sequence; position: `[N]`, the position in it, negative in the prompt.
    """

    @property
    def example_id(self) -> np.ndarray: ...
    @property
    def position(self) -> np.ndarray: ...


class ShardedRows(Protocol):
    """Rows that are read shard by shard.

    Attributes:
        counts: rows of each shard.
        mean_weight: of all rows.
    """

    @property
    def counts(self) -> list[int]: ...
    @property
    def mean_weight(self) -> float: ...
    def read(self, shards: Sequence[int]) -> Rows: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One process's part of a batch.

    Attributes:
        key: `[n, H]`, still encoded; target: `[n]` int64.
        share: `[n]` float32, each row's share of the loss: weight / (rows of the process's batch · the memory's mean
            weight). Over processes and an epoch, the mean of Σ share · loss is the memory's weighted mean.
        example: `[n]` int64, the sequence of each row, if the batch has whole sequences; prompt rows have share 0.
    """

    key: Keys
    target: np.ndarray
    share: np.ndarray
    example: np.ndarray | None = None

    @property
    def is_target(self) -> np.ndarray:
        """`[n]`: whether a row's target is predicted."""
        return self.share > 0

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` parts, or fewer if it has fewer rows (sequences)."""
        if self.example is None:
            borders = np.arange(len(self.target) + 1)
        else:
            borders = np.append(_starts(self.example), len(self.target))
        pieces = np.array_split(np.arange(len(borders) - 1), min(parts, len(borders) - 1))
        return [self._part(slice(borders[piece[0]], borders[piece[-1] + 1])) for piece in pieces]

    def _part(self, part: slice) -> Batch:
        example = None if self.example is None else self.example[part]
        return Batch(self.key.take(part), self.target[part], self.share[part], example)


@runtime_checkable
class BatchSampler(Protocol):
    """Batches of one process among several.

    Attributes:
        rows: of all processes together.
        batch_size: of all processes together.
        max_parts: into how many parts every process can split each batch.
    """

    rows: int
    batch_size: int
    max_parts: int
    steps_per_epoch: int

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's parts of the epoch's batches, from number `first` on."""
        ...

    def row_blocks(self) -> Iterator[Rows]:
        """This process's part of all rows, in blocks, each row once (over all processes)."""
        ...


class GlobalShuffle:
    """Batches of a permutation of all rows; the remainder at its end differs from epoch to epoch."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self._mean_weight = _mean_weight(rows.weight)
        self.rows = len(rows.target)
        self.batch_size = _global_batch_size(self.rows, batch_size, world)
        self.max_parts = self.batch_size // world
        self.steps_per_epoch = max(1, self.rows // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
        for step in range(first, self.steps_per_epoch):
            global_batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            index = np.sort(global_batch[self._rank :: self._world])  # sorted: memory is read in order
            yield _batch(self._rows, index, len(global_batch) / self._world, self._mean_weight)

    def row_blocks(self) -> Iterator[Rows]:
        for start in range(self._rank * CHUNK, self.rows, self._world * CHUNK):
            yield _Block(self._rows, slice(start, min(self.rows, start + CHUNK)))


class SequenceShuffle:
    """Batches of a permutation of all sequences, with about `batch_size` rows of targets each."""

    def __init__(self, rows: SequenceRows, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self._example = rows.example_id
        self._starts = _starts(self._example)
        self._ends = np.append(self._starts[1:], len(rows.target))
        self._is_target = rows.position >= 0
        self.rows = int(self._is_target.sum())
        sequences = len(self._starts)
        rows_per_sequence = self.rows / sequences
        batch_sequences = max(1, round(batch_size / rows_per_sequence))
        self._sequences = _global_batch_size(sequences, batch_sequences, world, "sequences")
        self.max_parts = self._sequences // world
        self._batch_rows = self._sequences * rows_per_sequence  # on average
        self.batch_size = round(self._batch_rows)
        self.steps_per_epoch = max(1, sequences // self._sequences)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._starts))
        for step in range(first, self.steps_per_epoch):
            global_batch = order[step * self._sequences : (step + 1) * self._sequences]
            yield self._batch(np.sort(global_batch[self._rank :: self._world]), self._world / self._batch_rows)

    def _batch(self, sequences: np.ndarray, share: float) -> Batch:
        index = np.concatenate([np.arange(int(self._starts[n]), int(self._ends[n])) for n in sequences])
        return Batch(
            self._rows.key.take(index),
            self._rows.target[index].astype(np.int64),
            np.where(self._is_target[index], share, 0).astype(np.float32),
            self._example[index],
        )

    def row_blocks(self) -> Iterator[Rows]:
        """Rows of targets: what stage 1 reconstructs."""
        index = np.flatnonzero(self._is_target)
        for start in range(self._rank * CHUNK, len(index), self._world * CHUNK):
            yield _Block(self._rows, index[start : start + CHUNK])

    def in_order(self, max_rows: int) -> Iterator[Batch]:
        """Whole sequences in order, until they hold `max_rows` rows of targets; shares are equal."""
        sequences: list[int] = []
        pending_rows = target_rows = 0
        for n in range(len(self._starts)):
            sequences.append(n)
            pending_rows += self._ends[n] - self._starts[n]
            target_rows += int(self._is_target[self._starts[n] : self._ends[n]].sum())
            if pending_rows >= _SEQUENCE_ROWS or target_rows >= max_rows or n + 1 == len(self._starts):
                rows = sum(int(self._is_target[self._starts[m] : self._ends[m]].sum()) for m in sequences)
                yield self._batch(np.array(sequences), 1 / rows)
                sequences, pending_rows = [], 0
            if target_rows >= max_rows:
                return


def in_order(rows: Rows, max_rows: int | None = None, size: int = CHUNK) -> Iterator[Batch]:
    """The first `max_rows` rows in order, `size` at a time; shares are relative to each batch's number of rows."""
    total = len(rows.target) if max_rows is None else min(max_rows, len(rows.target))
    mean_weight = _mean_weight(None if rows.weight is None else rows.weight[:total])
    for start in range(0, total, size):
        part = np.arange(start, min(total, start + size))
        yield _batch(rows, part, len(part), mean_weight)


def sequences_in_order(rows: SequenceRows, max_rows: int | None = None) -> Iterator[Batch]:
    """Whole sequences in order, until they hold `max_rows` rows of targets."""
    return SequenceShuffle(rows, 1, 0).in_order(len(rows.target) if max_rows is None else max_rows)


class WindowShuffle:
    """Batches of one window of shards after another; the next window is read while this one is trained on.

    The remainder of a window, less than a batch, is skipped in this epoch.
    """

    def __init__(
        self, shards: ShardedRows, window: int, batch_size: int, epochs: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._shards, self._window, self._seed, self._rank, self._world = shards, window, seed, rank, world
        if len(shards.counts) < world:
            raise UserError(
                f"train.workers={world}: the memory has {len(shards.counts)} shards, and train.shuffle=window gives "
                "each worker whole ones. Use fewer workers, smaller shards, or train.shuffle=global."
            )
        self.rows = sum(shards.counts)
        self.batch_size = _global_batch_size(self.rows, batch_size, world) // world * world
        self.max_parts = self.batch_size // world
        # Processes step together: the one with the fewest batches in any epoch limits the steps.
        self.steps_per_epoch = min(
            sum(self._steps(window) for window in self._windows(epoch, rank))
            for epoch in range(epochs)
            for rank in range(world)
        )
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size={batch_size}: a window of {window} shards holds less than a worker's part of a "
                "batch. Use a smaller batch, a larger train.window_shards, or train.shuffle=global."
            )

    def _windows(self, epoch: int, rank: int) -> list[list[int]]:
        """Windows that hold at least a batch, in the epoch's order."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._shards.counts))[rank :: self._world]
        windows = [order[at : at + self._window].tolist() for at in range(0, len(order), self._window)]
        return [window for window in windows if self._steps(window)]

    def _steps(self, window: Sequence[int]) -> int:
        return sum(self._shards.counts[shard] for shard in window) // (self.batch_size // self._world)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        windows, size = self._windows(epoch, self._rank), self.batch_size // self._world
        steps_before = 0  # steps of the windows before
        with ThreadPoolExecutor(1, initializer=compute_elsewhere) as reader:
            next_rows: Future[Rows] | None = None
            for number, window in enumerate(windows):
                steps = min(self._steps(window), self.steps_per_epoch - steps_before)
                begin, steps_before = max(0, first - steps_before), steps_before + steps
                if begin >= steps:
                    continue
                rows = next_rows.result() if next_rows else self._shards.read(window)
                has_next = number + 1 < len(windows) and steps_before < self.steps_per_epoch
                next_rows = reader.submit(self._shards.read, windows[number + 1]) if has_next else None
                order = np.random.default_rng([self._seed, epoch, self._rank, number]).permutation(len(rows.target))
                for step in range(begin, steps):
                    index = np.sort(order[step * size : (step + 1) * size])
                    yield _batch(rows, index, size, self._shards.mean_weight)

    def row_blocks(self) -> Iterator[Rows]:
        for shard in range(self._rank, len(self._shards.counts), self._world):
            rows = self._shards.read([shard])
            for start in range(0, len(rows.target), CHUNK):
                yield _Block(rows, slice(start, start + CHUNK))


class StreamShuffle:
    """The first epoch takes shards as they are produced and shuffles within each; later epochs shuffle all rows.

    For one process. Shards come in the plan's order, so a restarted epoch is the same.

    Args:
        rows: of the finished memory.
        mean_weight: of these rows.
        arrivals: starts the stream: the rows of each shard, in order.
        finished: all rows, once the stream has ended.
    """

    def __init__(
        self,
        rows: int,
        mean_weight: float,
        arrivals: Callable[[], Iterator[Rows]],
        finished: Callable[[], Rows],
        batch_size: int,
        seed: int,
    ) -> None:
        self._arrivals, self._finished, self._seed, self._mean_weight = arrivals, finished, seed, mean_weight
        self._stream: Iterator[Rows] | None = None
        self._all_rows: GlobalShuffle | None = None
        self.rows, self.batch_size = rows, _global_batch_size(rows, batch_size, 1)
        self.max_parts = self.batch_size
        self.steps_per_epoch = max(1, rows // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        if epoch:
            self._all_rows = self._all_rows or GlobalShuffle(self._finished(), self.batch_size, self._seed)
            yield from self._all_rows.batches(epoch, first)
            return
        shards = (
            (rows, np.random.default_rng([self._seed, number]).permutation(len(rows.target)))
            for number, rows in enumerate(self._restart())
        )
        for step, batch in enumerate(_across(shards, self.batch_size, self._mean_weight)):
            if first <= step < self.steps_per_epoch:  # reading the stream to its end builds the memory
                yield batch

    def row_blocks(self) -> Iterator[Rows]:
        """The first shard alone, as stage 1 cannot wait for the others."""
        stream = self._restart()
        first_shard = next(stream)
        self._stream = chain([first_shard], stream)
        for start in range(0, len(first_shard.target), CHUNK):
            yield _Block(first_shard, slice(start, start + CHUNK))

    def _restart(self) -> Iterator[Rows]:
        """The stream from its first shard, which `row_blocks` may have read already."""
        stream, self._stream = self._stream or self._arrivals(), None
        return iter(stream)


def _across(shards: Iterable[tuple[Rows, np.ndarray]], size: int, mean_weight: float) -> Iterator[Batch]:
    """Batches of `size` rows across shards, each in its order; the remainder is dropped."""
    parts: list[Batch] = []
    missing = size
    for rows, order in shards:
        while len(order):
            index, order = np.sort(order[:missing]), order[missing:]
            parts.append(_batch(rows, index, size, mean_weight))
            missing -= len(index)
            if not missing:
                target, share = (np.concatenate([getattr(p, name) for p in parts]) for name in ("target", "share"))
                yield Batch(Keys.concatenate([part.key for part in parts]), target, share)
                parts, missing = [], size


class _Block:
    """Some of the rows."""

    def __init__(self, rows: Rows, part: slice | np.ndarray) -> None:
        self.key, self.target = rows.key.take(part), rows.target[part]
        self.weight = None if rows.weight is None else rows.weight[part]


def _batch(rows: Rows, index: np.ndarray, size: float, mean_weight: float) -> Batch:
    """The rows of this index, in batches of `size` rows per process."""
    weight = np.ones(len(index)) if rows.weight is None else rows.weight[index]
    share = (weight / (size * mean_weight)).astype(np.float32)
    return Batch(rows.key.take(index), rows.target[index].astype(np.int64), share)


def _mean_weight(weight_N: np.ndarray | None) -> float:
    return 1.0 if weight_N is None else float(weight_N.mean(dtype=np.float64))


def _starts(example_N: np.ndarray) -> np.ndarray:
    """Where each sequence begins."""
    return np.flatnonzero(np.diff(example_N, prepend=example_N[0] - 1))


def _global_batch_size(rows: int, batch_size: int, world: int, unit: str = "rows") -> int:
    """Rows of all processes' batch, at most the memory's."""
    size = min(batch_size, rows)
    if size < world:
        raise UserError(
            f"train.workers={world}: {rows} {unit} in batches of {batch_size} give a worker nothing to do. "
            "Use fewer workers or a larger train.batch_size."
        )
    return size
