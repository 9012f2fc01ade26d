"""The event loop never waits for torch, a client that disconnects frees its slot, a failed engine answers all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped
from pema_ray.plm_owner.engine import Batcher, Engine, EngineConfig
from pema_ray.plm_owner.model.export import export_lm_head


@pytest.fixture
def start_engine(tiny_plm):
    plm = tiny_plm("llama")
    return lambda **settings: Engine(lambda: Batcher(plm, export_lm_head(plm).head, EngineConfig(**settings))).start()


@pytest.fixture
async def engine(start_engine, anyio_backend):
    engine = await start_engine(slots=2, pass_tokens=16)
    yield engine
    await engine.stop()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def slow_down(engine: Engine, seconds: float) -> None:
    """Delay every pass."""
    run = engine.batcher.run

    def slow():
        time.sleep(seconds)
        return run()

    engine.batcher.run = slow


async def test_the_event_loop_runs_during_a_pass(engine):
    slow_down(engine, 0.3)
    step = asyncio.create_task(engine.step("me", [Step("a", 0, [5])]))
    longest, before = 0.0, time.perf_counter()
    while not step.done():
        await asyncio.sleep(0.005)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert isinstance(step.result()[0], Stepped)
    assert longest < 0.25


async def test_a_client_that_disconnects_during_the_last_pass_of_a_prompt_leaves_no_session(engine):
    """The pass is running when its caller disconnects: the session that it opens is closed again."""
    run, opened = engine.batcher.run, threading.Event()

    def slow():
        done = run()
        opened.set()
        time.sleep(0.2)
        return done

    engine.batcher.run = slow
    step = asyncio.create_task(engine.step("me", [Step("a", 0, [5])]))
    await asyncio.to_thread(opened.wait)
    assert engine.batcher.live_sessions == 1
    step.cancel()
    await asyncio.gather(step, return_exceptions=True)
    await until(lambda: not engine.batcher.live_sessions)


async def test_a_client_that_disconnects_during_a_prompt_leaves_no_session(engine):
    slow_down(engine, 0.02)
    step = asyncio.create_task(engine.step("me", [Step("a", 0, [5] * 90), Step("b", 0, [6] * 90)]))
    await asyncio.sleep(0.05)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    await until(lambda: not engine.batcher.busy)
    assert engine.batcher.live_sessions == 0


async def test_a_failed_engine_answers_present_and_later_requests(engine):
    def fail():
        time.sleep(0.1)
        raise MemoryError("no room")

    engine.batcher.run = fail
    early = asyncio.create_task(engine.step("me", [Step("a", 0, [5])]))
    await asyncio.sleep(0.03)
    late = asyncio.create_task(engine.step("me", [Step("b", 0, [5])]))  # comes during the pass that fails
    for waiting in (early, late):
        (answer,) = await asyncio.wait_for(waiting, 5)
        assert isinstance(answer, Busy)
        assert "no room" in str(answer)
    assert not engine.healthy
    with pytest.raises(Busy, match="the engine has failed"):
        await engine.step("me", [Step("c", 0, [5])])


async def test_a_cancelled_extraction_stops(engine):
    slow_down(engine, 0.02)
    long = asyncio.create_task(engine.extract("me", ExtractBatch([[5] * 90] * 50, [0] * 50)))
    await until(lambda: engine.counts["passes"])
    long.cancel()
    rows = await engine.extract("me", ExtractBatch([[5, 6]], [0]))
    assert rows.shape[0] == 2
    assert engine.counts["passes"] < 10
    assert not engine.batcher.busy
    assert engine.batcher.waiting_tokens == 0


async def test_an_extraction_of_a_failed_or_stopped_engine_is_busy(start_engine, monkeypatch):
    for fails in (True, False):
        engine = await start_engine()
        slow_down(engine, 0.1)
        if fails:
            monkeypatch.setattr(engine.batcher._extraction, "advance", lambda job: 1 // 0)
        waiting = asyncio.create_task(engine.extract("me", ExtractBatch([[5] * 90] * 50, [0] * 50)))
        await asyncio.sleep(0.03)
        if not fails:
            await engine.stop()
        with pytest.raises(Busy, match="modulo by zero" if fails else "has stopped"):
            await asyncio.wait_for(waiting, 10)
        await engine.stop()


async def test_an_engine_that_is_stopped_loses_its_sessions(start_engine):
    engine = await start_engine()
    slow_down(engine, 0.2)
    waiting = asyncio.create_task(engine.step("me", [Step("a", 0, [5])]))
    await asyncio.sleep(0.05)
    await engine.stop()
    assert isinstance((await waiting)[0], SessionLost)


async def test_an_engine_that_is_stopped_just_as_it_is_woken_ends(start_engine):
    for turns in range(4):  # of the event loop between the two
        engine = await start_engine()
        await engine.step("me", [Step("a", 0, [5])])
        await asyncio.sleep(0.01)  # it waits for work by now
        await engine.close("me", ["a"])
        for _ in range(turns):
            await asyncio.sleep(0)
        ended, _ = await asyncio.wait([asyncio.create_task(engine.stop())], timeout=10)
        assert ended


async def test_an_idle_engine_forgets_abandoned_sessions_by_itself(start_engine):
    engine = await start_engine(slots=2, forget_seconds=0.2)
    await engine.step("me", [Step("a", 0, [5])])
    assert engine.batcher.live_sessions == 1
    await until(lambda: not engine.batcher.live_sessions)
    await engine.stop()
