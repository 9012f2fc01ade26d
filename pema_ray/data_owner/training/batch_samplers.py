"""Which rows make up which batch, for every training process. Knows no Ray. N rows, H hidden.

A batch follows from (seed, epoch, place in the epoch) alone, so that a run which resumes at a step sees what it
would have seen.

- `GlobalShuffle`: every epoch is a permutation of all rows; they must be at hand one by one (in RAM, or in the
  object store). The batch of n processes is the batch of one, dealt out: some get a row more than others.
- `StreamShuffle`: the first epoch takes shards as a build produces them.
- `SequenceShuffle`: the same with whole sequences, prompts included, for adapters that look back.
- `WindowShuffle`: a process reads whole shards, in an order drawn anew every epoch, and shuffles the rows of a few of
  them together: for memories that fit no process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np

from pema_ray.errors import UserError
from pema_ray.memory.codec import Keys
from pema_ray.runtime.hardware import compute_elsewhere

CHUNK = 8192  # rows handled at once where no gradient is kept
_SEQUENCE_ROWS = 2048  # of whole sequences handled at once where no gradient is kept: they are padded to the longest


class Representations(Protocol):
    """A memory's encoded keys `[N, H]`; indexing decodes, `take` does not."""

    def __getitem__(self, index: np.ndarray | slice, /) -> np.ndarray: ...
    def take(self, index: np.ndarray | slice, /) -> Keys: ...


@runtime_checkable
class Rows(Protocol):
    """What training reads: `key [N, H]`, `target [N]`, and `weight [N]` where rows do not all count once."""

    @property
    def key(self) -> Representations: ...
    @property
    def target(self) -> np.ndarray: ...
    @property
    def weight(self) -> np.ndarray | None: ...


class SequenceRows(Rows, Protocol):
    """Rows that lie together and in order, sequence by sequence.

    Attributes:
        example_id: `[N]`, the sequence; position: `[N]`, its place there, negative in the prompt.
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
        example: `[n]` int64, the sequence of each row, where whole ones are wanted; rows of a prompt have share 0.
    """

    key: Keys
    target: np.ndarray
    share: np.ndarray
    example: np.ndarray | None = None

    @property
    def wanted(self) -> np.ndarray:
        """`[n]`: which rows' targets are to be predicted."""
        return self.share > 0

    def split(self, parts: int) -> list[Batch]:
        """The batch in so many parts, or as many as it has rows (sequences)."""
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
        pieces: rows, or sequences, that each process has of every batch at least.
    """

    rows: int
    batch_size: int
    pieces: int
    steps_per_epoch: int

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's parts of the epoch's batches, from number `first` on."""
        ...

    def once(self) -> Iterator[Rows]:
        """This process's part of all rows, in blocks, each row once (over all processes)."""
        ...


class GlobalShuffle:
    """Batches of a permutation of all rows; what is left over at its end differs from epoch to epoch."""

    def __init__(self, rows: Rows, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self._mean_weight = _mean_weight(rows.weight)
        self.rows = len(rows.target)
        self.batch_size = _shared_out(self.rows, batch_size, world)
        self.pieces = self.batch_size // world
        self.steps_per_epoch = max(1, self.rows // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
        for step in range(first, self.steps_per_epoch):
            everyones = order[step * self.batch_size : (step + 1) * self.batch_size]
            mine = np.sort(everyones[self._rank :: self._world])  # sorted: memory is read in order
            yield _batch(self._rows, mine, len(everyones) / self._world, self._mean_weight)

    def once(self) -> Iterator[Rows]:
        for start in range(self._rank * CHUNK, self.rows, self._world * CHUNK):
            yield _Block(self._rows, slice(start, min(self.rows, start + CHUNK)))


class SequenceShuffle:
    """Batches of a permutation of all sequences: as many as have about `batch_size` rows of targets."""

    def __init__(self, rows: SequenceRows, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self._example = rows.example_id
        self._starts = _starts(self._example)
        self._ends = np.append(self._starts[1:], len(rows.target))
        self._wanted = rows.position >= 0
        self.rows = int(self._wanted.sum())
        sequences = len(self._starts)
        each = self.rows / sequences
        self._sequences = _shared_out(sequences, max(1, round(batch_size / each)), world, "sequences")
        self.pieces = self._sequences // world
        self._batch_rows = self._sequences * each  # on average
        self.batch_size = round(self._batch_rows)
        self.steps_per_epoch = max(1, sequences // self._sequences)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._starts))
        for step in range(first, self.steps_per_epoch):
            everyones = order[step * self._sequences : (step + 1) * self._sequences]
            yield self._batch(np.sort(everyones[self._rank :: self._world]), self._world / self._batch_rows)

    def _batch(self, sequences: np.ndarray, share: float) -> Batch:
        index = np.concatenate([np.arange(int(self._starts[n]), int(self._ends[n])) for n in sequences])
        return Batch(
            self._rows.key.take(index),
            self._rows.target[index].astype(np.int64),
            np.where(self._wanted[index], share, 0).astype(np.float32),
            self._example[index],
        )

    def once(self) -> Iterator[Rows]:
        """Rows of targets: what stage 1 reconstructs."""
        index = np.flatnonzero(self._wanted)
        for start in range(self._rank * CHUNK, len(index), self._world * CHUNK):
            yield _Block(self._rows, index[start : start + CHUNK])

    def in_order(self, most: int) -> Iterator[Batch]:
        """Whole sequences, in their order, until they hold `most` rows of targets; shares are equal."""
        held: list[int] = []
        waiting = found = 0
        for n in range(len(self._starts)):
            held.append(n)
            waiting += self._ends[n] - self._starts[n]
            found += int(self._wanted[self._starts[n] : self._ends[n]].sum())
            if waiting >= _SEQUENCE_ROWS or found >= most or n + 1 == len(self._starts):
                rows = sum(int(self._wanted[self._starts[m] : self._ends[m]].sum()) for m in held)
                yield self._batch(np.array(held), 1 / rows)
                held, waiting = [], 0
            if found >= most:
                return


def in_order(rows: Rows, most: int | None = None, size: int = CHUNK) -> Iterator[Batch]:
    """The first `most` rows, in their order, `size` at a time; a batch counts as its number of rows."""
    total = len(rows.target) if most is None else min(most, len(rows.target))
    mean_weight = _mean_weight(None if rows.weight is None else rows.weight[:total])
    for start in range(0, total, size):
        part = np.arange(start, min(total, start + size))
        yield _batch(rows, part, len(part), mean_weight)


def sequences_in_order(rows: SequenceRows, most: int | None = None) -> Iterator[Batch]:
    """The same with whole sequences, until they hold `most` rows of targets."""
    return SequenceShuffle(rows, 1, 0).in_order(len(rows.target) if most is None else most)


class WindowShuffle:
    """Batches of a window of shards at a time; the next window is read while this one is trained on.

    Rows left over at a window's end, fewer than a batch, sit this epoch out.
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
        self.batch_size = _shared_out(self.rows, batch_size, world) // world * world
        self.pieces = self.batch_size // world
        # Whoever has the fewest batches in any epoch sets the number of steps: processes step together.
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
        """Those that hold a batch at least, in the epoch's order."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._shards.counts))[rank :: self._world]
        windows = [order[at : at + self._window].tolist() for at in range(0, len(order), self._window)]
        return [window for window in windows if self._steps(window)]

    def _steps(self, window: Sequence[int]) -> int:
        return sum(self._shards.counts[shard] for shard in window) // (self.batch_size // self._world)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        windows, size = self._windows(epoch, self._rank), self.batch_size // self._world
        done = 0  # steps of the windows before
        with ThreadPoolExecutor(1, initializer=compute_elsewhere) as reader:
            coming: Future[Rows] | None = None
            for number, window in enumerate(windows):
                steps = min(self._steps(window), self.steps_per_epoch - done)
                begin, done = max(0, first - done), done + steps
                if begin >= steps:
                    continue
                rows = coming.result() if coming else self._shards.read(window)
                more = number + 1 < len(windows) and done < self.steps_per_epoch
                coming = reader.submit(self._shards.read, windows[number + 1]) if more else None
                order = np.random.default_rng([self._seed, epoch, self._rank, number]).permutation(len(rows.target))
                for step in range(begin, steps):
                    mine = np.sort(order[step * size : (step + 1) * size])
                    yield _batch(rows, mine, size, self._shards.mean_weight)

    def once(self) -> Iterator[Rows]:
        for shard in range(self._rank, len(self._shards.counts), self._world):
            rows = self._shards.read([shard])
            for start in range(0, len(rows.target), CHUNK):
                yield _Block(rows, slice(start, start + CHUNK))


class StreamShuffle:
    """A first epoch of shards as they are produced, mixed within each; later epochs shuffle all rows.

    Made for one process. The order of shards is the plan's, so the epoch is the same however often it is begun.

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
        self._later: GlobalShuffle | None = None
        self.rows, self.batch_size = rows, _shared_out(rows, batch_size, 1)
        self.pieces = self.batch_size
        self.steps_per_epoch = max(1, rows // self.batch_size)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        if epoch:
            self._later = self._later or GlobalShuffle(self._finished(), self.batch_size, self._seed)
            yield from self._later.batches(epoch, first)
            return
        step, waiting = 0, _Waiting()
        for number, rows in enumerate(self._begin()):
            waiting.add(rows, np.random.default_rng([self._seed, number]).permutation(len(rows.target)))
            while len(waiting) >= self.batch_size and step < self.steps_per_epoch:
                batch = waiting.take(self.batch_size, self._mean_weight)
                if step >= first:
                    yield batch
                step += 1

    def once(self) -> Iterator[Rows]:
        """The first shard alone: stage 1 cannot wait for the others."""
        stream = self._begin()
        head = next(stream)
        self._stream = chain([head], stream)
        for start in range(0, len(head.target), CHUNK):
            yield _Block(head, slice(start, start + CHUNK))

    def _begin(self) -> Iterator[Rows]:
        """The stream from its start, whose first shard `once` may have looked at already."""
        stream, self._stream = self._stream or self._arrivals(), None
        return iter(stream)


class _Waiting:
    """Rows that have arrived and are in no batch yet."""

    def __init__(self) -> None:
        self._held: list[tuple[Rows, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(order) for _, order in self._held)

    def add(self, rows: Rows, order: np.ndarray) -> None:
        self._held.append((rows, order))

    def take(self, count: int, mean_weight: float) -> Batch:
        parts: list[Batch] = []
        left = count
        while left:
            rows, order = self._held[0]
            mine, rest = np.sort(order[:left]), order[left:]
            self._held[:1] = [(rows, rest)] if len(rest) else []
            left -= len(mine)
            parts.append(_batch(rows, mine, count, mean_weight))
        target, share = (np.concatenate([getattr(part, name) for part in parts]) for name in ("target", "share"))
        return Batch(Keys.concatenate([part.key for part in parts]), target, share)


class _Block:
    """Some of the rows."""

    def __init__(self, rows: Rows, part: slice | np.ndarray) -> None:
        self.key, self.target = rows.key.take(part), rows.target[part]
        self.weight = None if rows.weight is None else rows.weight[part]


def _batch(rows: Rows, mine: np.ndarray, size: float, mean_weight: float) -> Batch:
    """The rows `mine`, of batches of `size` rows a process."""
    weight = np.ones(len(mine)) if rows.weight is None else rows.weight[mine]
    share = (weight / (size * mean_weight)).astype(np.float32)
    return Batch(rows.key.take(mine), rows.target[mine].astype(np.int64), share)


def _mean_weight(weight_N: np.ndarray | None) -> float:
    return 1.0 if weight_N is None else float(weight_N.mean(dtype=np.float64))


def _starts(example_N: np.ndarray) -> np.ndarray:
    """Where each sequence begins."""
    return np.flatnonzero(np.diff(example_N, prepend=example_N[0] - 1))


def _shared_out(rows: int, batch_size: int, world: int, what: str = "rows") -> int:
    """The batch of all processes, whatever their number: a memory smaller than one is a single batch."""
    size = min(batch_size, rows)
    if size < world:
        raise UserError(
            f"train.workers={world}: {rows} {what} in batches of {batch_size} give a worker nothing to do. "
            "Use fewer workers or a larger train.batch_size."
        )
    return size
