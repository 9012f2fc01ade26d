"""Who waits for an opening no more leaves no session behind, wherever the step was when he went."""

from __future__ import annotations

import asyncio

import pytest
from serving_kit import DirectHandle

from pema_ray.line.stepping import Step, Stepped
from pema_ray.plm_owner.replicas import Replicas
from pema_ray.plm_owner.service import PLMEngine


@pytest.fixture
async def handle(tiny_plm_folder, anyio_backend):
    config = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(config, {"slots": 4, "max_tokens": 90, "prefill_tokens": 16}), 2)
    for replica in handle.replicas.values():
        await replica.describe()
    yield handle
    for replica in handle.replicas.values():
        await (await replica._engine()).stop()


async def live(handle: DirectHandle) -> int:
    return sum([(await replica.state())["live_sessions"] for replica in handle.replicas.values()])


async def becomes(handle: DirectHandle, sessions: int) -> None:
    async with asyncio.timeout(20):
        while await live(handle) != sessions:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("when", ["before it begins", "in its prompt", "while its answer is on the way"])
@pytest.mark.parametrize("closed", ["before", "after", "never"])
async def test_an_opening_that_is_cancelled_leaves_no_session(handle, when, closed):
    line, handle.wire_seconds = Replicas(handle), 0.3
    opening = asyncio.create_task(line.step([Step("a", 0, [5] * 80), Step("b", 0, [6] * 80)]))
    if when == "before it begins":
        await asyncio.sleep(0)
    elif when == "in its prompt":
        async with asyncio.timeout(20):
            while not await live(handle):
                await asyncio.sleep(0)
    else:
        await becomes(handle, 2)
        async with asyncio.timeout(20):
            while any([(await replica._engine()).batcher.busy for replica in handle.replicas.values()]):
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
    if closed == "before":
        await line.close(["a", "b"])
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    if closed == "after":
        await line.close(["a", "b"])
    async with asyncio.timeout(20):
        while line._answering:
            await asyncio.sleep(0.01)
    await becomes(handle, 0)
    assert not line._closed
    assert not line._flying


async def test_a_session_whose_step_is_cancelled_lives_until_it_is_closed(handle):
    """Saying the step again goes on where it stands: its home is known."""
    line = Replicas(handle)
    await line.step([Step("a", 0, [5, 6])])
    step = asyncio.create_task(line.step([Step("a", 2, [7])]))
    await asyncio.sleep(0)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    (again,) = await line.step([Step("a", 2, [7])])
    assert isinstance(again, Stepped)
    await line.close(["a"])
    await becomes(handle, 0)


async def test_extraction_that_nobody_waits_for_ends_between_two_passes(handle):
    from pema_ray.line import ExtractBatch

    for replica in handle.replicas.values():
        replica.config = replica.config.model_copy(update={"extract_tokens": 64})
    line = Replicas(handle)
    passes = []
    for replica in handle.replicas.values():
        extract = replica._extract
        replica._extract = lambda owner, piece, extract=extract: (passes.append(1), extract(owner, piece))[1]
    asked = asyncio.create_task(line.extract(ExtractBatch([[5] * 60] * 200, [0] * 200)))
    async with asyncio.timeout(20):
        while not passes:
            await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await asyncio.sleep(0.1)
    before = len(passes)
    await asyncio.sleep(0.2)
    assert len(passes) == before < 200


async def test_an_answer_that_is_lost_on_its_way_leaves_no_session(handle):
    """The replica has opened the session and answered; who cancelled the call never hears where."""
    line, handle.wire_seconds, handle.loses_answers = Replicas(handle), 0.3, True
    opening = asyncio.create_task(line.step([Step("a", 0, [5, 6])]))
    await becomes(handle, 1)
    await asyncio.sleep(0.1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert await live(handle) == 1
    await becomes(handle, 0)
    assert not line._closed
