"""Replicas are a `PLMClient` with session affinity: cancelled openings leave no session, other PLMs are refused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from serving_kit import DirectHandle

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ExtractBatch, SessionLost, Step, Stepped
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas


def engine_of(folder: str) -> PLMEngine:
    config = {"name": folder, "dtype": "float32", "device": "cpu", "threads": 1}
    return PLMEngine(config, {"slots": 4, "max_tokens": 90, "pass_tokens": 64})


@pytest.fixture
async def handle(tiny_plm_folder, anyio_backend):
    handle = DirectHandle(lambda: engine_of(tiny_plm_folder("llama")), 2)
    for replica in handle.replicas.values():
        await replica.describe()
    yield handle
    for replica in handle.replicas.values():
        await replica.plm.end()


async def live(handle: DirectHandle) -> int:
    return sum([(await replica.state())["live_sessions"] for replica in handle.replicas.values()])


async def wait_for_sessions(handle: DirectHandle, count: int) -> None:
    async with asyncio.timeout(20):
        while await live(handle) != count:
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
        await wait_for_sessions(handle, 2)
        async with asyncio.timeout(20):
            while any(replica.plm.batcher.busy for replica in handle.replicas.values()):
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
    await wait_for_sessions(handle, 0)
    assert not line._closed
    assert not line._in_flight


async def test_a_session_whose_step_is_cancelled_lives_until_it_is_closed(handle):
    """Repeating the step continues the session: its replica is known."""
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
    await wait_for_sessions(handle, 0)


async def test_a_cancelled_extraction_ends_between_two_passes(handle):
    line = Replicas(handle)
    passes = [(await replica.plm.engine()).counts for replica in handle.replicas.values()]
    request = asyncio.create_task(line.extract(ExtractBatch([[5] * 60] * 400, [0] * 400)))
    async with asyncio.timeout(20):
        while not any(counts["passes"] for counts in passes):
            await asyncio.sleep(0)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    async with asyncio.timeout(20):
        while any(replica.plm.batcher.busy for replica in handle.replicas.values()):
            await asyncio.sleep(0.01)
    assert sum(counts["passes"] for counts in passes) < 200


async def test_an_answer_that_is_lost_on_its_way_leaves_no_session(handle):
    """The replica has opened the session and answered; the cancelled caller never learns where."""
    line, handle.wire_seconds, handle.loses_answers = Replicas(handle), 0.3, True
    opening = asyncio.create_task(line.step([Step("a", 0, [5, 6])]))
    await wait_for_sessions(handle, 1)
    await asyncio.sleep(0.1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert await live(handle) == 1
    await wait_for_sessions(handle, 0)
    assert not line._closed


async def test_replicas_answer_as_a_plm_in_this_process_does(handle, tiny_client):
    line, local = Replicas(handle), tiny_client("llama", slots=4, max_tokens=90, pass_tokens=64)
    assert await line.describe() == await local.describe()
    assert torch.equal((await line.lm_head()).head.weight, (await local.lm_head()).head.weight)
    batch = ExtractBatch([[5, 6, 7], [8] * 40], [1, 0], tuple(range(10, 30)))
    assert torch.equal(await line.extract(batch), await local.extract(batch))
    steps = [Step("a", 0, [5, 6, 7], 2, draft=2), Step("lost", 4, [1]), Step("long", 0, [5] * 91), Step("b", 0, [999])]
    outcomes, expected = await line.step(steps), await local.step(steps)
    assert isinstance(outcomes[0], Stepped) and isinstance(expected[0], Stepped)
    assert torch.equal(outcomes[0].state_NH, expected[0].state_NH) and outcomes[0].drafted == expected[0].drafted
    assert isinstance(outcomes[1], SessionLost) and isinstance(expected[1], SessionLost)
    for number, words in ((2, "91 tokens is longer"), (3, "999 is no token")):
        assert words in str(outcomes[number]) == str(expected[number])
        assert isinstance(outcomes[number], UserError) and isinstance(expected[number], UserError)
    for client in (line, local):
        with pytest.raises(UserError, match="91 tokens is longer"):
            await client.extract(ExtractBatch([[5] * 91], [0]))
        with pytest.raises(UserError, match="999 is no token"):
            await client.extract(ExtractBatch([[999]], [0]))
        await client.close(["a", "lost"])
        assert isinstance((await client.step([Step("a", 3, [5])]))[0], SessionLost)
    await line.end()


async def test_a_replica_of_another_checkpoint_refuses_the_steps_of_an_answer(handle, tiny_plm_folder):
    """It replaces the one that began the answer; the old LM head does not fit its states."""
    line = Replicas(handle)
    card = (await line.describe()).card
    (opened,) = await line.step([Step("a", 0, [5, 6], draft=2)])
    assert isinstance(opened, Stepped)
    handle._make = lambda: engine_of(tiny_plm_folder("llama", 1))
    for name in list(handle.replicas):
        await handle.replicas[name].plm.end()
        handle.kill(name)
        handle.add()
    with pytest.raises(FingerprintMismatch, match=rf"^The PLM owner .* 'tiny-llama\d+ \(.* '{card.fingerprint}'"):
        await line.step([Step("a", 4, [7])])
    for _ in range(2):  # in every other call too
        with pytest.raises(FingerprintMismatch):
            await line.step([Step("a", 0, [5, 6, 7])])
        with pytest.raises(FingerprintMismatch):
            await line.extract(ExtractBatch([[5]], [0]))
        with pytest.raises(FingerprintMismatch):
            await line.lm_head()
    assert await live(handle) == 0
    assert isinstance((await Replicas(handle).step([Step("b", 0, [5])]))[0], Stepped)  # a client of the new PLM


async def test_while_replicas_are_replaced_sessions_of_the_old_ones_continue(handle, tiny_plm_folder):
    line = Replicas(handle)
    names = [f"s{i}" for i in range(4)]
    assert all(isinstance(o, Stepped) for o in await line.step([Step(name, 0, [5], waits=False) for name in names]))
    handle._make = lambda: engine_of(tiny_plm_folder("llama", 1))
    await handle.replicas["r0"].plm.end()
    handle.kill("r0")
    handle.add()
    outcomes = await line.step([Step(name, 1, [6]) for name in names])
    assert {type(outcome) for outcome in outcomes} <= {Stepped, SessionLost, FingerprintMismatch}
    assert sum(isinstance(outcome, Stepped) for outcome in outcomes) == 2  # those of r1
    opened = await line.step([Step(f"new{i}", 0, [5], waits=False) for i in range(4)])
    assert {type(outcome) for outcome in opened} == {Stepped, FingerprintMismatch}  # of r1 and of r2
    assert (await handle.replicas["r2"].state())["live_sessions"] == 0


async def test_another_plm_than_the_expected_one_is_refused_at_every_call(handle):
    line = Replicas(handle, fingerprint="0" * 16, label="plm.serve=pema")
    for call in (
        line.describe(),
        line.lm_head(),
        line.extract(ExtractBatch([[5]], [0])),
        line.step([Step("a", 0, [5])]),
    ):
        with pytest.raises(FingerprintMismatch, match="'0000000000000000'"):
            await call
    assert await live(handle) == 0


async def test_replicas_report_waiting_tokens(handle):
    replica = handle.replicas["r0"]
    assert await replica.record_autoscaling_stats() == {"live_sessions": 0.0, "waiting_tokens": 0.0}
    request = asyncio.create_task(replica.plm.extract(ExtractBatch([[5] * 60] * 400, [0] * 400)))
    async with asyncio.timeout(20):
        while not (await replica.record_autoscaling_stats())["waiting_tokens"]:
            await asyncio.sleep(0)
    assert (await replica.state())["waiting_tokens"] > 0
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)


@pytest.mark.parametrize(
    "running", [{}, {"pluglm": ["PlugLM"]}, {"pema": ["PLMEngine", "DataOwner"], "pluglm": ["PlugLM"]}]
)
def test_an_application_that_does_not_run_is_named_with_those_that_do(monkeypatch, running):
    from ray import serve

    applications = {name: SimpleNamespace(deployments=dict.fromkeys(names)) for name, names in running.items()}
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(serve, "get_deployment_handle", lambda deployment, app_name: (deployment, app_name))
    only = "pema" if "pema" in running else "none"
    for name in ("pemma", "pluglm"):
        with pytest.raises(UserError, match=f"plm.serve={name}: no PLM owner of this name .*, only: {only}"):
            Replicas.of_application(name)
    if "pema" in running:
        assert Replicas.of_application("pema", "me", "0" * 16)._handle == ("PLMEngine", "pema")


async def test_openings_of_one_answer_go_to_one_replica_and_others_are_spread(handle):
    line = Replicas(handle)
    await line.step([Step(name, 0, [5, 6]) for name in "ab"])
    assert [call for call in handle.calls if call[0] == "step"] == [("step", None)]
    handle.calls.clear()
    await line.step([Step(name, 0, [5, 6], waits=False) for name in "cd"])
    assert [call for call in handle.calls if call[0] == "step"] == [("step", None)] * 2
    await line.close(list("abcd"))
