"""Batches: every row occurs, in one process alone, in an order that depends on seed and epoch."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.training.batch_samplers import GlobalShuffle, StreamShuffle, WindowShuffle, in_order
from pema_ray.errors import UserError
from pema_ray.memory import MemoryRows


class Shards:
    """Rows in shards that record which were read."""

    def __init__(self, rows: MemoryRows, counts: list[int]) -> None:
        ends = np.cumsum(counts)
        self._parts = [rows.take(slice(end - count, end)) for end, count in zip(ends, counts)]
        self.requested: list[list[int]] = []

    @property
    def counts(self) -> list[int]:
        return [len(part) for part in self._parts]

    @property
    def mean_weight(self) -> float:
        weights = [np.ones(len(part)) if part.weight is None else part.weight for part in self._parts]
        return float(np.concatenate(weights).mean())

    def read(self, shards) -> MemoryRows:
        self.requested.append(list(shards))
        return MemoryRows.concatenate([self._parts[shard] for shard in shards])


def marked(make_rows, count: int) -> MemoryRows:
    """Distinguishable rows: the target of row i is i."""
    return replace(make_rows(count, 0), target=np.arange(count, dtype=np.int32))


def targets(sampler, epoch: int, first: int = 0) -> list[list[int]]:
    return [batch.target.tolist() for batch in sampler.batches(epoch, first)]


@given(st.integers(20, 200), st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_processes_share_out_the_batches_of_one(make_rows, count: int, size: int, world: int, epoch: int):
    if size < world:
        return
    rows = marked(make_rows, count)
    shuffles = [GlobalShuffle(rows, size, 7, rank, world) for rank in range(world)]
    single = GlobalShuffle(rows, size, 7)
    assert shuffles[0].batch_size == min(size, count)  # an epoch has equally many steps with any number of workers
    shared = [sorted(chain(*parts)) for parts in zip(*(targets(sampler, epoch) for sampler in shuffles), strict=True)]
    assert shared == [sorted(batch) for batch in targets(single, epoch)]
    assert len(shared) == single.steps_per_epoch == shuffles[0].steps_per_epoch


@given(st.lists(st.integers(1, 30), min_size=4, max_size=12), st.integers(1, 5), st.integers(1, 3), st.integers(2, 12))
def test_windows_contain_a_row_at_most_once_and_all_but_the_remainder(
    make_rows, counts: list[int], window: int, world: int, size: int
):
    size = size * world
    rows = marked(make_rows, sum(counts))
    try:
        samplers = [WindowShuffle(Shards(rows, counts), window, size, 2, 7, rank, world) for rank in range(world)]
    except UserError as refused:  # too few rows for a batch
        assert "holds less than a worker's part" in str(refused) or "nothing to do" in str(refused)  # noqa: PT017
        return
    for epoch in range(2):
        batches_by_process = [targets(sampler, epoch) for sampler in samplers]
        assert {len(batches) for batches in batches_by_process} == {samplers[0].steps_per_epoch}
        flat = [row for batches in batches_by_process for batch in batches for row in batch]
        assert len(flat) == len(set(flat)) == samplers[0].steps_per_epoch * samplers[0].batch_size
    if world == 1:
        windows = -(-len(counts) // window)
        assert len(flat) > sum(counts) - (windows + 1) * size - (samplers[0].steps_per_epoch == 0) * sum(counts)


@pytest.mark.parametrize("kind", ["global", "window"])
def test_an_epoch_can_resume_at_any_batch(make_rows, kind: str):
    rows = marked(make_rows, 200)
    for first in (0, 1, 5, 11, 12):
        shards = Shards(rows, [23, 40, 17, 60, 60])
        sampler = GlobalShuffle(rows, 16, 7) if kind == "global" else WindowShuffle(shards, 2, 16, 3, 7)
        assert targets(sampler, 1, first) == targets(sampler, 1)[first:]


def test_a_window_that_is_over_is_not_read_to_resume(make_rows):
    shards = Shards(marked(make_rows, 200), [50, 50, 50, 50])
    sampler = WindowShuffle(shards, 1, 10, 1, 7)
    list(sampler.batches(0))
    order = shards.requested.copy()
    shards.requested.clear()
    list(sampler.batches(0, 12))
    assert len(order) == 4 and shards.requested == order[2:]


def test_epochs_differ_and_rows_of_a_window_are_mixed(make_rows):
    shards = Shards(marked(make_rows, 400), [50] * 8)
    sampler = WindowShuffle(shards, 4, 40, 2, 7)
    first_epoch, second_epoch = targets(sampler, 0), targets(sampler, 1)
    assert {tuple(sorted(batch)) for batch in first_epoch}.isdisjoint({tuple(sorted(batch)) for batch in second_epoch})
    assert all(len({row // 50 for row in batch}) > 2 for batch in first_epoch)


def test_once_gives_every_row_to_one_process(make_rows):
    rows = marked(make_rows, 20_000)
    counts = [7000, 9000, 4000]
    for make in (
        lambda rank: GlobalShuffle(rows, 64, 7, rank, 3),
        lambda rank: WindowShuffle(Shards(rows, counts), 1, 64, 1, 7, rank, 3),
    ):
        blocks = [block.target for rank in range(3) for block in make(rank).row_blocks()]
        assert max(map(len, blocks)) <= 8192
        assert sorted(np.concatenate(blocks).tolist()) == list(range(20_000))


@pytest.mark.parametrize("kind", ["global", "window", "stream", "in order"])
@pytest.mark.parametrize("heavy", [1, 20_000])
def test_every_row_counts_as_often_as_it_occurs(make_rows, kind: str, heavy: int):
    """Over an epoch, a row's shares are proportional to its weight, whatever batch it lies in."""
    weight = np.random.default_rng(0).integers(1, 9, 240).astype(np.int32)
    weight[[3, 50, 51, 120, 239]] *= heavy
    rows = replace(marked(make_rows, 240), weight=weight)
    shards = Shards(rows, [60] * 4)
    samplers = {
        "global": lambda rank: GlobalShuffle(rows, 30, 7, rank, 3),
        "window": lambda rank: WindowShuffle(shards, 1, 20, 1, 7, rank, 2),
        "stream": lambda _: StreamShuffle(
            240, shards.mean_weight, lambda: iter([shards.read([n]) for n in range(4)]), lambda: rows, 30, 7
        ),
    }
    world = {"global": 3, "window": 2}.get(kind, 1)
    share = np.zeros(240)
    for rank in range(world):
        batches = list(in_order(rows, size=80) if kind == "in order" else samplers[kind](rank).batches(0))
        for batch in batches:
            share[batch.target] += batch.share / (len(batches) * world)
    assert share == pytest.approx(weight / weight.sum(), rel=1e-5)


def test_rows_of_equal_weight_share_equally(make_rows):
    for weight in (None, np.full(200, 7, np.int32)):
        plain = GlobalShuffle(replace(marked(make_rows, 200), weight=weight), 30, 7, 1, 3)
        assert all(batch.share == pytest.approx(np.full(10, 0.1)) for batch in plain.batches(0))


def test_batches_too_small_for_the_workers_are_refused(make_rows):
    rows = marked(make_rows, 60)
    with pytest.raises(UserError, match="train.workers=3: 60 rows in batches of 2 give a worker nothing to do"):
        GlobalShuffle(rows, 2, 7, 0, 3)
    with pytest.raises(UserError, match="train.workers=3: the memory has 2 shards, and train.shuffle=window"):
        WindowShuffle(Shards(rows, [30, 30]), 1, 12, 1, 7, 0, 3)
    with pytest.raises(UserError, match="a window of 1 shards holds less than a worker's part of a batch"):
        WindowShuffle(Shards(rows, [15] * 4), 1, 40, 1, 7, 0, 2)
