"""Answers stay the same, or end with a reason, whatever fails between the decoder and the PLM owner."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from decoding_kit import (
    GREEDY,
    PROMPTS,
    SAMPLE,
    Forgetful,
    World,
    answers,
    decoding,
    ids_of,
    make_adapter,
    requests,
    various,
)

from pema_ray.data_owner.decoding import GenerationAborted, GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.text import AnswerText
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, SessionLost
from pema_ray.plm_owner.service.replicas import Replicas

BEAM = SamplingParams("beam", beams=3)
KINDS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLE, BEAM], ids=lambda s: s.kind)


@pytest.fixture
def world_of(tiny_plm_folder, tiny_plm):
    return lambda **settings: World(tiny_plm_folder("llama"), make_adapter(tiny_plm("llama")), **settings)


@pytest.fixture
async def expected_of(tiny_client, tiny_plm):
    async def expected(requested: list[GenerationRequest]) -> list[list[int]]:
        return ids_of(await answers(tiny_client("llama"), requested, make_adapter(tiny_plm("llama"))))

    return expected


def many(sampling: SamplingParams = GREEDY) -> list[GenerationRequest]:
    """Twelve requests, some of the PLM alone, some with drafts."""
    requested = [*various(draft=4), *requests(0.7), *various(adapter=None)]
    return [replace(request, sampling=sampling, stream=n) for n, request in enumerate(requested)]


# ── sessions and replicas that are lost ─────────────────────────────────────


@KINDS
@pytest.mark.parametrize("lockstep", [True, False])
async def test_a_lost_session_is_opened_again_with_the_same_answer(tiny_client, tiny_plm, sampling, lockstep: bool):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    requested = requests(sampling=sampling)
    undisturbed = await answers(client, requested, adapter)
    for every in (1, 3):
        forgetful = Forgetful(client, every)
        async with decoding(forgetful, adapter, lockstep=lockstep) as decoder:  # type: ignore[arg-type]
            assert ids_of(await decoder.generate(requested)) == ids_of(undisturbed)
            assert decoder.counts["replays"] == forgetful.lost > 0
    engine = await client.engine()
    assert await _comes_true(lambda: engine.batcher.live_sessions == 0)


async def test_a_replica_that_dies_at_any_step_changes_no_answer(world_of, expected_of):
    requested = replace(requests()[0], max_new_tokens=8)
    (expected,) = await expected_of([requested])
    at, steps = 0, 1
    while steps > at:
        async with world_of(replicas=2) as world:
            steps = 0

            def before_call(method: str, world=world, at=at) -> None:
                nonlocal steps
                steps += method == "step"
                if method == "step" and steps == at + 1:
                    for name in set(world.line._owner_replica.values()) or {"r0"}:
                        world.kill(name)

            world.handle.before = before_call
            assert await world.all([requested]) == [expected]
            assert await world.live_sessions() == 0
        at += 1
    assert at > 5


@KINDS
async def test_replicas_that_come_and_go_under_many_answers_change_none(world_of, expected_of, sampling):
    requested = many(sampling) * 2
    expected, draw = await expected_of(requested), random.Random(1)
    async with world_of(replicas=2, slots=72) as world:  # a beam that waits for a slot delays the others
        calls = 0

        def before_call(method: str) -> None:
            nonlocal calls
            calls += method == "step"
            if method == "step" and draw.random() < 0.1 and calls < 120:
                world.kill(draw.choice(sorted(world.handle.replicas)))

        world.handle.before = before_call
        assert await world.all(requested) == expected
        assert world.decoder.counts["replays"] + world.decoder.counts["busy"] > 0
        assert await world.live_sessions() == 0
        assert world.decoder.live == 0


async def test_more_answers_than_slots_all_come_to_an_end(world_of, expected_of):
    requested = many() * 2
    async with world_of(slots=3, idle_seconds=0.05) as world:  # so few that sessions often lose their slots
        assert await world.all(requested) == await expected_of(requested)
        assert await world.live_sessions() == 0


NEVER = {"idle_seconds": 3600, "timeout_seconds": 3600}  # no session loses its slot, no wait times out


@pytest.mark.parametrize("over", ["engine", "handle"])
@pytest.mark.parametrize(
    ("sampling", "lockstep"), [(GREEDY, True), (BEAM, True), (BEAM, False)], ids=["greedy", "beams", "served beams"]
)
async def test_data_owners_that_want_all_slots_do_not_block_each_other(
    tiny_client, world_of, tiny_plm, expected_of, over: str, sampling, lockstep: bool
):
    requested = many() if sampling is GREEDY else requests(sampling=sampling, max_new_tokens=8)
    settings = {"max_sequences": 4 if lockstep else 30, "lockstep": lockstep}
    async with asyncio.timeout(120), AsyncExitStack() as stack:
        if over == "engine":
            clients = [tiny_client("llama", slots=4, **NEVER)] * 3
        else:
            world = await stack.enter_async_context(world_of(slots=4, **NEVER))
            clients = [Replicas(world.handle, name) for name in "abc"]
        adapter = make_adapter(tiny_plm("llama"))
        decoders = [await stack.enter_async_context(decoding(c, adapter, **settings)) for c in clients]
        answered = await asyncio.gather(*(decoder.generate(requested) for decoder in decoders))
        assert sum(decoder.counts["busy"] for decoder in decoders) > 0
        assert sum(decoder.counts["replays"] for decoder in decoders) == 0
        for client in clients if over == "handle" else []:
            await client.end()
    assert list(map(ids_of, answered)) == [await expected_of(requested)] * 3


async def test_a_beam_search_that_waits_for_slots_waits_alone(world_of, expected_of):
    """Three slots of four are taken until the greedy answers have ended; the beams need three."""
    greedy, (searched, *_) = many()[-3:], requests(sampling=BEAM)
    greedy = [replace(request, max_new_tokens=30, draft=0) for request in greedy]
    ends: list[str] = []
    async with asyncio.timeout(120), world_of(slots=4, **NEVER) as world:

        async def end_of(request: GenerationRequest, name: str) -> list[int]:
            ids = [token.id for token in await world.tokens(request, timeout=3600)]
            ends.append(name)
            return ids

        tasks = [asyncio.create_task(end_of(request, "greedy")) for request in greedy]
        while (await world.handle.replicas["r0"].state())["live_sessions"] < 3:
            await asyncio.sleep(0)
        *greedy_ids, beam_ids = await asyncio.gather(*tasks, end_of(searched, "beams"))
        assert world.decoder.counts["busy"] == 0
        assert await world.live_sessions() == 0
    assert ends[0] == "greedy"
    assert greedy_ids == await expected_of(greedy)
    assert [beam_ids] == await expected_of([searched])


async def test_beam_searches_among_more_greedy_answers_than_may_open_at_once_all_end(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama", slots=4, **NEVER), make_adapter(tiny_plm("llama"))
    beams = replace(requests()[0], sampling=SamplingParams("beam", beams=2), max_new_tokens=4)
    greedy = [replace(request, max_new_tokens=4) for request in requests()] * 5
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        decoders = [await stack.enter_async_context(decoding(client, adapter, lockstep=False)) for _ in range(2)]
        answered = await asyncio.gather(*(decoder.generate([beams, beams, *greedy]) for decoder in decoders))
    assert ids_of(answered[0]) == ids_of(answered[1])


async def test_a_beam_search_opens_no_more_sessions_than_it_has_beams(tiny_client, tiny_plm, expected_of):
    client, opened = tiny_client("llama"), set()
    step = client.step

    async def watched(steps):
        opened.update(s.session for s in steps)
        return await step(steps)

    client.step = watched
    (requested,) = requests(sampling=BEAM)[:1]
    answered = await answers(client, [requested], make_adapter(tiny_plm("llama")))
    assert len(opened) == 3
    assert ids_of(answered) == await expected_of([requested])


@pytest.mark.parametrize("lockstep", [True, False])
async def test_beams_that_are_lost_together_are_opened_again_in_one_message(tiny_client, tiny_plm, lockstep: bool):
    client = tiny_client("llama")
    step, messages = client.step, []

    async def losing(steps):
        messages.append([s.position for s in steps])
        if len(messages) == 5:
            await client.close([s.session for s in steps])
        return await step(steps)

    client.step = losing
    async with decoding(client, make_adapter(tiny_plm("llama")), lockstep=lockstep) as decoder:
        await decoder.generate(requests(sampling=BEAM)[:1])
        assert decoder.counts["replays"] == 3
    assert messages[5] == [0, 0, 0]


async def test_a_session_that_is_lost_every_time_ends_its_answer(tiny_client, tiny_plm, monkeypatch):
    monkeypatch.setattr("pema_ray.data_owner.decoding.decoder._REPLAYS", 3)
    client = tiny_client("llama")
    step = client.step

    async def losing(steps):
        outcomes = await step(steps)
        return [SessionLost() if s.tokens[:2] == [0, 200] else o for s, o in zip(steps, outcomes, strict=True)]

    client.step = losing
    async with decoding(client, make_adapter(tiny_plm("llama")), lockstep=False) as decoder:
        results = await asyncio.gather(*(decoder.generate([r]) for r in requests()), return_exceptions=True)
    assert [isinstance(result, GenerationAborted) for result in results] == [prompt[1] == 200 for prompt in PROMPTS]
    assert "loses this session every time" in str(results[1])


# ── PLM owners that are busy, gone or others ────────────────────────────────


@pytest.mark.parametrize("lockstep", [True, False])
async def test_a_busy_plm_owner_is_asked_again_and_keeps_the_sessions(world_of, expected_of, lockstep: bool):
    requested = many()
    async with world_of(slots=16) as world:
        calls = 0

        def before_call(method: str) -> None:
            nonlocal calls
            calls += method == "step"
            if method == "step" and calls % 3 == 0:
                raise Busy("the quota is used up", 0.01)

        world.handle.before = before_call
        async with decoding(world.line, world.decoder.predictors, lockstep=lockstep) as decoder:
            assert ids_of(await decoder.generate(requested)) == await expected_of(requested)
            assert decoder.counts["busy"] > 5
            assert decoder.counts["replays"] == 0


@pytest.mark.parametrize("lockstep", [True, False])
async def test_a_line_that_breaks_is_tried_again(tiny_client, tiny_plm, expected_of, lockstep: bool):
    client, calls = tiny_client("llama"), 0
    step = client.step

    async def breaking(steps):
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            raise ConnectionError("no route")
        return await step(steps)

    client.step = breaking
    results = await answers(client, requests(), make_adapter(tiny_plm("llama")), lockstep=lockstep)
    assert ids_of(results) == await expected_of(requests())


@pytest.mark.parametrize("lockstep", [True, False])
async def test_an_absent_plm_owner_is_reported_in_bounded_time(world_of, lockstep: bool):
    async with world_of() as world, decoding(world.line, world.decoder.predictors, lockstep=lockstep) as decoder:
        world.handle.kill("r0")
        with pytest.raises(GenerationAborted, match=r"not finished within 0.5 seconds|did not answer in time"):
            await decoder.generate(requests()[:1], timeout=0.5)
        assert decoder.live == 0


async def test_the_time_of_an_answer_begins_with_its_first_step(tiny_client, tiny_plm, expected_of):
    """In lockstep, the time that requests wait for room does not count."""
    client, busy = tiny_client("llama"), {}
    step = client.step

    async def slow(steps):
        await asyncio.sleep(0.03)
        name = steps[0].session
        busy[name] = busy.get(name, 0) + 1
        return [Busy("a moment", 0.01)] * len(steps) if busy[name] == 2 else await step(steps)

    client.step = slow
    requested = [replace(request, max_new_tokens=6) for request in requests() * 2]
    async with decoding(client, make_adapter(tiny_plm("llama")), max_sequences=1) as decoder:
        assert ids_of(await decoder.generate(requested, timeout=0.9)) == await expected_of(requested)
    assert sum(busy.values()) * 0.03 > 1.2  # seconds, of all


@pytest.mark.parametrize("lockstep", [True, False])
async def test_another_plm_in_its_place_ends_all_answers(tiny_client, tiny_plm, lockstep: bool):
    """Stages get its name; callers of a service do not."""
    client, calls = tiny_client("llama"), 0
    step = client.step

    async def replaced(steps):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise FingerprintMismatch("The PLM owner", "other (b)", "a")
        return await step(steps)

    client.step = replaced
    async with decoding(client, make_adapter(tiny_plm("llama")), lockstep=lockstep) as decoder:
        results = await asyncio.gather(*(decoder.generate([r]) for r in requests()), return_exceptions=True)
        assert {type(result) for result in results} == {FingerprintMismatch if lockstep else GenerationAborted}
        assert decoder.live == 0


# ── callers, and the decoder's own end ──────────────────────────────────────


async def test_a_caller_that_leaves_frees_its_sessions(world_of):
    async with world_of() as world:
        for request in (requests()[0], replace(requests()[0], sampling=BEAM)):
            answer = world.decoder.answer(request)
            waiting = asyncio.ensure_future(anext(answer))
            assert await _comes_true(lambda: bool(world.line._owner_replica))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await answer.aclose()
            assert world.decoder.live == 0
            assert await world.live_sessions() == 0


async def test_a_caller_that_leaves_makes_room_in_lockstep(tiny_client, tiny_plm, expected_of):
    adapter, requested = make_adapter(tiny_plm("llama")), requests()
    async with decoding(tiny_client("llama"), adapter, max_sequences=1) as decoder:
        leaving = decoder.answer(requested[0])
        await anext(leaving)
        waiting = asyncio.create_task(decoder.generate(requested[1:3]))
        cancelled = asyncio.create_task(decoder.generate(requested[3:]))
        await asyncio.sleep(0)
        cancelled.cancel()
        await leaving.aclose()
        assert ids_of(await waiting) == (await expected_of(requested))[1:3]
        assert decoder.live == 0


async def test_answers_beyond_the_limit_are_rejected(world_of):
    async with world_of(max_sequences=5) as world:
        requested = [*requests(), replace(requests()[0], sampling=BEAM), requests()[1], requests()[2]]
        results = await asyncio.gather(*map(world.tokens, requested), return_exceptions=True)
        busy = [isinstance(result, Busy) for result in results]
        assert busy == [False] * 4 + [True, False, True]  # three beams have no room
        assert await world.live_sessions() == 0


async def test_a_decoder_that_stops_aborts_its_answers_and_closes_their_sessions(world_of):
    async def remaining_tokens(answer) -> list:
        return [token async for token in answer]

    async with world_of() as world:
        running = [world.decoder.answer(request) for request in requests()[:3]]
        for answer in running:
            await anext(answer)
        await world.decoder.stop()
        assert await world.live_sessions() == 0
        for answer in running:
            with pytest.raises(GenerationAborted, match="the data owner's service ends"):
                await remaining_tokens(answer)
        with pytest.raises(RuntimeError, match="has stopped"):
            world.decoder.check_health()


@pytest.mark.parametrize("lockstep", [True, False])
async def test_an_answer_that_fails_ends_no_other(tiny_client, tiny_plm, expected_of, monkeypatch, lockstep: bool):
    """Its text fails to decode, its prompt is too long, or its adapter is unknown."""
    push = AnswerText.push

    def breaking(text: AnswerText, token: int) -> str:
        return push(text, token) if "break" not in text._stop else 1 / 0  # type: ignore[return-value]

    monkeypatch.setattr(AnswerText, "push", breaking)
    good = requests()
    bad = [replace(good[0], stop=("break",)), replace(good[1], prompt=[5] * 97), replace(good[2], adapter="yours")]
    async with decoding(tiny_client("llama"), make_adapter(tiny_plm("llama")), lockstep=lockstep) as decoder:
        requested = [*bad, *good]
        results = await asyncio.gather(*(decoder.generate([r]) for r in requested), return_exceptions=True)
        assert [type(result) for result in results[:3]] == [ZeroDivisionError, UserError, UserError]
        assert [result[0].ids for result in results[3:]] == await expected_of(good)  # type: ignore[index]
        assert decoder.live == 0


async def _comes_true(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


async def test_requests_that_cannot_be_answered_are_rejected_and_not_waited_for(tiny_client):
    client = tiny_client("llama")
    async with decoding(client, max_sessions=2) as decoder:
        with pytest.raises(UserError, match="at least one token"):
            await decoder.generate([GenerationRequest([], 3, UnrollingSchedule(0.0))])
        with pytest.raises(UserError, match="3 beams: the PLM owner allows 2 sessions"):
            await decoder.generate([GenerationRequest([5], 3, UnrollingSchedule(0.0), sampling=BEAM)])
    with pytest.raises(GenerationAborted, match="has stopped"):
        await decoder.generate([GenerationRequest([5], 3, UnrollingSchedule(0.0))])


async def test_beam_searches_never_need_more_sessions_together_than_there_are(tiny_client):
    request = GenerationRequest([0, 5, 9], 6, UnrollingSchedule(0.0), sampling=BEAM)
    async with decoding(tiny_client("llama"), lockstep=False, max_sessions=5) as decoder:
        results = await asyncio.gather(*(decoder.generate([request]) for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(result, Busy) for result in results) == 2


async def test_an_error_of_the_line_in_one_steps_place_is_retried(tiny_client):
    class Breaking:
        def __init__(self, client) -> None:
            self._client, self.messages = client, 0

        def __getattr__(self, name: str):
            return getattr(self._client, name)

        async def step(self, steps):
            self.messages += 1
            outcomes = await self._client.step(steps)
            return [ConnectionError("the wire was cut"), *outcomes[1:]] if self.messages == 3 else outcomes

    requested = [GenerationRequest(prompt, 6, UnrollingSchedule(0.0)) for prompt in PROMPTS]
    breaking = Breaking(tiny_client("llama"))
    assert ids_of(await answers(breaking, requested, eos=[])) == ids_of(
        await answers(tiny_client("llama"), requested, eos=[])
    )
    assert breaking.messages > 3
