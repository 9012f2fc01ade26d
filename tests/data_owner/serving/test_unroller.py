"""Served answers are those of the offline generator, token for token, whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from serving_kit import DirectHandle

from pema_ray.data_owner.adapter import AdapterConfig, PemaAdapter
from pema_ray.data_owner.generation import Decoding, Generator, Request
from pema_ray.data_owner.serving.orders import GivenUp, Order, Token
from pema_ray.data_owner.serving.unroller import Unroller
from pema_ray.data_owner.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.line.stepping import Busy
from pema_ray.plm_owner.replicas import Replicas
from pema_ray.plm_owner.service import PLMEngine

PROMPTS = [[0, 5, 9, 20, 44], [0, 7], [0, 5, 9, 20, 44, 61, 8, 9, 10, 11, 12], [0, 30, 31, 32, 30, 31]]
SCHEDULES = [
    UnrollingSchedule(0.7),
    UnrollingSchedule(1.0, "linear", 0.1),
    UnrollingSchedule(0.9, "quadratic"),
    UnrollingSchedule(0.0),
]


@pytest.fixture(scope="module")
def adapter(tiny_source) -> PemaAdapter:
    card = tiny_source("llama").describe()
    torch.manual_seed(3)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint, residual=True))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter.eval()


def offline(tiny_source, adapter, orders: list[Order]) -> list[list[int]]:
    source = tiny_source("llama")
    head = source.lm_head().head
    answers = []
    for order in orders:
        expert = None if order.adapter is None else adapter
        generator = Generator(source, head, expert, lambda ids: "", source.describe().eos_token_ids)
        request = Request(list(order.prompt), order.max_new_tokens, order.schedule, order.length)
        streams = [order.seed_stream]
        answers.append(generator.generate([request], order.decoding, streams=streams)[0].tokens)
    return answers


class World:
    """A PLM owner with some replicas, and a data owner's unroller over it."""

    def __init__(self, folder: str, adapter: PemaAdapter, replicas: int = 1, **engine) -> None:
        plm = {"name": folder, "dtype": "float32", "device": "cpu", "threads": 1}
        self.handle = DirectHandle(lambda: PLMEngine(plm, {"slots": 8, **engine}), replicas)
        self._adapter = adapter

    async def __aenter__(self) -> World:
        self.line = Replicas(self.handle)
        bundle = await self.line.lm_head()
        tokenizer = bundle.tokenizer()
        detokenize = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        self.unroller = Unroller(self.line, bundle.head, detokenize, bundle.card.eos_token_ids)
        self.unroller.adapters = {"mine": self._adapter}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unroller.stop()
        for replica in self.handle.replicas.values():
            await (await replica._engine()).stop()

    async def tokens(self, order: Order, timeout: float = 60.0) -> list[Token]:
        return [token async for token in self.unroller.answer(order, timeout)]

    async def all(self, orders: list[Order]) -> list[list[int]]:
        answers = await asyncio.gather(*(self.tokens(order) for order in orders))
        return [[token.id for token in answer] for answer in answers]

    async def live_sessions(self) -> int:
        for _ in range(100):
            states = [await replica.state() for replica in self.handle.replicas.values()]
            if not any(state["live_sessions"] for state in states):
                return 0
            await asyncio.sleep(0.02)
        return sum(state["live_sessions"] for state in states)


@pytest.fixture
def world_of(tiny_plm_folder, adapter):
    return lambda **settings: World(tiny_plm_folder("llama"), adapter, **settings)


def orders(draft: int = 4, decoding: Decoding | None = None) -> list[Order]:
    made = []
    for number, prompt in enumerate(PROMPTS * 2):
        made.append(
            Order(
                prompt,
                max_new_tokens=20,
                schedule=SCHEDULES[number % 4],
                adapter=None if number == 5 else "mine",
                length=12,
                decoding=decoding or Decoding(),
                draft=draft,
                seed_stream=number,
            )
        )
    return made


@pytest.mark.parametrize("draft", [0, 1, 6])
@pytest.mark.parametrize("decoding", [Decoding(), Decoding("sample", 0.8, 0.9, seed=5)], ids=["greedy", "sampled"])
async def test_many_answers_at_once_are_those_of_the_offline_generator(world_of, tiny_source, adapter, draft, decoding):
    wanted = orders(draft, decoding)
    async with world_of() as world:
        assert await world.all(wanted) == offline(tiny_source, adapter, wanted)
        assert await world.live_sessions() == 0
        counts = world.unroller.counts
        assert counts["replays"] == 0
        if decoding.kind == "greedy":  # which repeats itself, as chance does not
            assert (counts["accepted"] > 0) == (draft > 0)
        if not draft:
            steps = [method for method, _ in world.handle.calls if method == "step"]
            assert len(steps) < 0.6 * counts["tokens"]  # many tokens to a message


async def test_a_replica_that_dies_at_any_step_changes_no_answer(world_of, tiny_source, adapter):
    (wanted,) = [orders()[0]]
    (expected,) = offline(tiny_source, adapter, [wanted])
    at = 0
    while True:
        async with world_of(replicas=2) as world:
            step = 0

            def before(method: str, world=world, at=at) -> None:
                nonlocal step
                if method == "step":
                    step += 1
                    if step == at + 1:
                        homes = set(world.line._homes.values())
                        for name in homes or {"r0"}:
                            world.handle.kill(name)
                            world.handle.add()

            world.handle.before = before
            assert await world.all([wanted]) == [expected]
            assert await world.live_sessions() == 0
            if step <= at:
                break
        at += 1
    assert at > 5


@pytest.mark.parametrize("seed", range(3))
async def test_replicas_that_come_and_go_under_many_answers_change_none(world_of, tiny_source, adapter, seed):
    wanted = orders() * 2
    draw = random.Random(seed)
    async with world_of(replicas=2) as world:
        calls = 0

        def before(method: str) -> None:
            nonlocal calls
            calls += method == "step"
            if method == "step" and draw.random() < 0.1 and calls < 120:
                world.handle.kill(draw.choice(sorted(world.handle.replicas)))
                world.handle.add()

        world.handle.before = before
        assert await world.all(wanted) == offline(tiny_source, adapter, wanted)
        assert world.unroller.counts["replays"] + world.unroller.counts["busy"] > 0
        assert await world.live_sessions() == 0
        assert world.unroller.live == 0


async def test_more_answers_than_slots_all_come_to_an_end(world_of, tiny_source, adapter):
    wanted = orders() * 2
    async with world_of(slots=3, idle_seconds=0.05) as world:  # so few that sessions lose their slots all the time
        assert await world.all(wanted) == offline(tiny_source, adapter, wanted)
        assert await world.live_sessions() == 0


async def test_who_stops_listening_gives_the_slot_back(world_of):
    async with world_of() as world:
        answer = world.unroller.answer(orders()[0])
        await anext(answer)
        assert (await world.handle.replicas["r0"].state())["live_sessions"] == 1
        await answer.aclose()
        assert world.unroller.live == 0
        assert await world.live_sessions() == 0


async def test_a_service_that_ends_gives_up_its_answers_and_closes_their_sessions(world_of):
    async def rest_of(answer) -> list[Token]:
        return [token async for token in answer]

    async with world_of() as world:
        answers = [world.unroller.answer(order) for order in orders()[:3]]
        for answer in answers:
            await anext(answer)
        await world.unroller.stop()
        assert await world.live_sessions() == 0
        for answer in answers:
            with pytest.raises(GivenUp, match="the data owner's service ends"):
                await rest_of(answer)


async def test_a_plm_owner_that_is_gone_is_told_in_bounded_time(world_of):
    async with world_of() as world:
        world.handle.kill("r0")
        with pytest.raises(GivenUp, match="not finished within 0.5 seconds|loses this session"):
            await world.tokens(orders()[0], timeout=0.5)
        assert world.unroller.live == 0


async def test_one_answer_that_fails_fails_alone(world_of, tiny_source, adapter):
    wanted = orders()[:4]
    async with world_of() as world:
        bad = world.unroller._begin(wanted[0], 0).text

        class Broken(type(bad)):
            def push(self, token: int) -> str:
                raise RuntimeError("this text cannot be shown")

        begin = world.unroller._begin

        def breaking(order, deadline):
            sequence = begin(order, deadline)
            if order is wanted[1]:
                sequence.text = Broken(lambda ids: "")
            return sequence

        world.unroller._begin = breaking
        answers = await asyncio.gather(*(world.tokens(order) for order in wanted), return_exceptions=True)
        expected = offline(tiny_source, adapter, wanted)
        assert isinstance(answers[1], RuntimeError)
        assert [[t.id for t in answers[i]] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
        assert await world.live_sessions() == 0


async def test_a_busy_plm_owner_is_asked_again_and_keeps_the_sessions(world_of, tiny_source, adapter):
    wanted = orders()[:6]
    async with world_of() as world:
        calls = 0

        def before(method: str) -> None:
            nonlocal calls
            calls += method == "step"
            if method == "step" and calls % 3 == 0:
                raise Busy("the quota is used up", 0.01)

        world.handle.before = before
        assert await world.all(wanted) == offline(tiny_source, adapter, wanted)
        assert world.unroller.counts["busy"] > 5
        assert world.unroller.counts["replays"] == 0


async def test_more_answers_than_may_live_are_sent_away(world_of):
    async with world_of() as world:
        world.unroller._most_live = 2
        results = await asyncio.gather(*(world.tokens(order) for order in orders()[:5]), return_exceptions=True)
        assert sum(isinstance(result, Busy) for result in results) == 3
        assert await world.live_sessions() == 0


async def test_texts_too_long_and_unknown_adapters_are_refused(world_of):
    async with world_of(max_tokens=30) as world:
        with pytest.raises(UserError, match="31 tokens is longer than"):
            await world.tokens(Order([0] * 31, 5, SCHEDULES[0]))
        with pytest.raises(UserError, match="no adapter 'yours'; there are mine"):
            await world.tokens(Order([0], 5, SCHEDULES[0], adapter="yours"))
        assert await world.live_sessions() == 0


async def test_an_adapter_that_is_swapped_does_not_change_answers_that_have_begun(world_of, tiny_source, adapter):
    wanted = orders()[2]
    (expected,) = offline(tiny_source, adapter, [wanted])
    async with world_of() as world:
        got = []
        async for token in world.unroller.answer(wanted):
            got.append(token.id)
            world.unroller.adapters = {}
        assert got == expected


async def test_explanations_say_who_decided(world_of, adapter):
    order = Order(PROMPTS[0], 6, UnrollingSchedule(0.6, "linear"), "mine", 6, explain=True, top=3, draft=0)
    async with world_of() as world:
        answer = await world.tokens(order)
        alone = await world.tokens(Order(PROMPTS[0], 6, SCHEDULES[0], None, explain=True))
    for step, token in enumerate(answer):
        e = token.explained
        assert e is not None
        assert e.lam == pytest.approx(order.schedule.at(step, 6))
        mixed = e.lam * torch.tensor(e.log_pema).exp() + (1 - e.lam) * torch.tensor(e.log_plm).exp()
        assert token.log_prob == pytest.approx(float(mixed.log()), abs=1e-4)
        assert len(token.top) == 3 and token.top[0] == (token.id, token.log_prob)
        assert len(e.top_pema) == len(e.top_plm) == 5
        share = e.lam * torch.tensor(e.log_pema).exp() / mixed
        assert (e.decided_by == "pema") == bool(share >= 0.5)
    assert all(token.explained is not None and token.explained.lam == 0 for token in alone)
