"""The loader brings the same batches to the device, in order, and passes errors on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pema_ray.data_owner.training.batch_samplers import Batch, GlobalShuffle
from pema_ray.data_owner.training.loader import load, load_parts
from pema_ray.errors import UserError
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import KEY_DTYPES, encode

CPU = torch.device("cpu")


def rows_in(make_rows, dtype: str, count: int = 100) -> MemoryRows:
    rows = make_rows(count, 3)
    weight = np.arange(1, count + 1, dtype=np.int32)
    return MemoryRows(encode(rows.key[:], dtype), rows.target, rows.example_id, rows.position, weight)


def sampler(make_rows, dtype: str = "float16") -> GlobalShuffle:
    return GlobalShuffle(rows_in(make_rows, dtype), 16, 7)


@pytest.mark.parametrize("dtype", KEY_DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_arrive_in_order_and_decoded(make_rows, dtype: str, device: str):
    batches = sampler(make_rows, dtype)
    loaded = [parts for _, parts in load((batch.split(3) for batch in batches.batches(0)), torch.device(device))]
    expected = [batch.split(3) for batch in batches.batches(0)]
    assert [len(parts) for parts in loaded] == [len(parts) for parts in expected] == [3] * 6
    for parts, expected_parts in zip(loaded, expected, strict=True):
        for (state, target, share, example), batch in zip(parts, expected_parts, strict=True):
            assert state.device.type == target.device.type == share.device.type == device
            assert state.dtype == torch.float32 and example is None
            np.testing.assert_array_equal(state.cpu().numpy(), batch.key[:])
            assert (target.tolist(), share.tolist()) == (batch.target.tolist(), batch.share.tolist())


def test_whole_batches_come_beside_their_tensors(make_rows):
    for batch, (state, target, _, _) in load_parts(sampler(make_rows).batches(1), CPU):
        assert target.tolist() == batch.target.tolist() and len(state) == len(batch.key)


def test_an_error_is_raised_when_its_batch_is_due(make_rows):
    good = list(sampler(make_rows).batches(0))[:2]

    def failing() -> Iterator[list[Batch]]:
        yield from ([batch] for batch in good)
        raise UserError("the shard is damaged")

    loaded = load(failing(), CPU)
    assert [part[1].tolist() for _, (part,) in (next(loaded), next(loaded))] == [b.target.tolist() for b in good]
    with pytest.raises(UserError, match="the shard is damaged"):
        next(loaded)


def test_a_loader_that_is_closed_leaves_no_thread_and_reads_no_further_than_prefetch(make_rows):
    batch, drawn = next(sampler(make_rows).batches(0)), []

    def endless() -> Iterator[list[Batch]]:
        while True:
            drawn.append(threading.current_thread())
            yield [batch]

    loaded = load(endless(), CPU, prefetch=2)
    next(loaded)
    loaded.close()
    assert len(drawn) <= 3 and threading.main_thread() not in drawn
    assert not any(thread.is_alive() for thread in drawn)
