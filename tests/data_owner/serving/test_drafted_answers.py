"""Whatever is guessed, by whom and how far, answers stay what they are: greedy ones token for token, others in law."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_unroller import PROMPTS, SCHEDULES, World, offline, orders

from pema_ray.data_owner.adapter import AdapterConfig, PemaAdapter
from pema_ray.data_owner.generation import Decoding
from pema_ray.data_owner.serving.drafts import Guess, MemoryLookup
from pema_ray.data_owner.serving.orders import Order
from pema_ray.data_owner.serving.pace import BY_PLM, Bet, Pace
from pema_ray.data_owner.unrolling import UnrollingSchedule, mix
from pema_ray.line import ExtractBatch


class Whim(Pace):
    """Bets at random: what was guessed, the PLM's guesses, nothing, or nonsense."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self.bets: Counter[str] = Counter()

    def choose(self, offers: Sequence[tuple[Sequence[Guess], int, int]]) -> list[Bet]:
        return [self._one(*offer) for offer in offers]

    def _one(self, guesses: Sequence[Guess], most: int, by_plm: int) -> Bet:
        what = self._draw.choice(["text", "plm", "nothing", "nonsense"])
        if what == "text" and guesses:
            guess = self._draw.choice(guesses)
            bet = Bet(guess.kind, tuple(guess.tokens[: self._draw.randrange(1, most + 1)]))
        elif what == "plm" and by_plm:
            bet = Bet(BY_PLM, (), self._draw.randrange(1, by_plm + 1))
        elif what == "nonsense" and most:
            bet = Bet("nonsense", tuple(self._draw.randrange(3, 300) for _ in range(self._draw.randrange(1, most + 1))))
        else:
            return Bet()
        self.bets[bet.kind.split()[0]] += 1
        return bet


@pytest.fixture(scope="module")
def adapter(tiny_source) -> PemaAdapter:
    return make_adapter(tiny_source)


def make_adapter(tiny_source, **more) -> PemaAdapter:
    card = tiny_source("llama").describe()
    torch.manual_seed(3)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint, residual=True, **more))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return adapter.eval()


def memory_of(answers: list[list[int]]) -> MemoryLookup:
    token = np.array([token for answer in answers for token in answer])
    return MemoryLookup(token, np.array([i == 0 for answer in answers for i in range(len(answer))]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decoding", [Decoding(), Decoding("sample", 0.8, 0.9, seed=5)], ids=["greedy", "sampled"])
async def test_any_guesses_change_no_answer_even_when_replicas_die(
    tiny_plm_folder, tiny_source, adapter, decoding, seed
):
    wanted = orders(6, decoding)
    expected = offline(tiny_source, adapter, wanted)
    draw = random.Random(seed)
    async with World(tiny_plm_folder("llama"), adapter, replicas=2) as world:

        def before(method: str) -> None:
            if method == "step" and seed and draw.random() < 0.05:
                world.handle.kill(draw.choice(sorted(world.handle.replicas)))
                world.handle.add()

        world.handle.before = before
        world.unroller.pace = whim = Whim(seed)
        world.unroller.most_drafted, world.unroller.memories = 6, {"mine": memory_of(expected)}
        assert await world.all(wanted) == expected
        assert whim.bets["plm"] and whim.bets["nonsense"] and whim.bets["memory"] + whim.bets["text"]
        assert world.unroller.counts["accepted"] > 0
        assert await world.live_sessions() == 0


async def test_a_memory_of_the_right_answers_spares_most_round_trips(tiny_plm_folder, tiny_source, adapter):
    wanted = [order for order in orders(8) if order.adapter]
    expected = offline(tiny_source, adapter, wanted)
    trips = []
    for memories in ({}, {"mine": memory_of(expected)}):
        async with World(tiny_plm_folder("llama"), adapter) as world:
            world.unroller.memories = memories
            assert [(await world.all([order]))[0] for order in wanted] == expected
            trips.append(world.unroller.counts["round_trips"])
    assert trips[1] < 0.6 * trips[0]


async def test_where_round_trips_are_long_the_plm_owner_guesses_too(tiny_plm_folder, tiny_source, adapter):
    wanted = Order(PROMPTS[0], 40, SCHEDULES[3], "mine", 40, draft=8)  # λ = 0: the PLM's guesses are always right
    (expected,) = offline(tiny_source, adapter, [wanted])
    async with World(tiny_plm_folder("llama"), adapter) as world:
        world.unroller.most_drafted = 8
        step = world.line.step

        async def far_away(steps):
            await asyncio.sleep(0.05)
            return await step(steps)

        world.line.step = far_away
        assert await world.all([wanted]) == [expected]
        assert world.unroller.counts["round_trips"] < 0.5 * len(expected)


@pytest.mark.parametrize(
    "more",
    [
        {"look_back_layers": 2, "look_back_width": 16, "prompt_from": 2},
        {"local_memory_width": 16},
        {"look_back_layers": 1, "look_back_width": 16, "local_memory_width": 16, "predicts_lambda": True},
    ],
    ids=lambda more: "+".join(more),
)
async def test_an_adapter_that_reads_whole_sequences_is_served_as_it_generates(
    tiny_plm_folder, tiny_source, adapter, more
):
    looking = make_adapter(tiny_source, **more)
    wanted = orders(4)
    expected = offline(tiny_source, looking, wanted)
    assert expected != offline(tiny_source, make_adapter(tiny_source), wanted)
    draw = random.Random(1)
    async with World(tiny_plm_folder("llama"), looking, replicas=2) as world:

        def before(method: str) -> None:
            if method == "step" and draw.random() < 0.05:
                world.handle.kill(draw.choice(sorted(world.handle.replicas)))
                world.handle.add()

        world.handle.before = before
        world.unroller.adapters = {"mine": looking, "other": adapter}
        mixed = [*wanted, Order(PROMPTS[0], 10, SCHEDULES[0], "other", 10)]
        got = await world.all(mixed)
        assert got[:-1] == expected
        assert got[-1] == offline(tiny_source, adapter, mixed[-1:])[0]
        assert await world.live_sessions() == 0


@pytest.mark.parametrize("more", [{}, {"look_back_layers": 1, "look_back_width": 16}], ids=["newest", "look back"])
async def test_an_adapter_that_predicts_its_lambda_is_explained_by_what_it_predicts(tiny_plm_folder, tiny_source, more):
    gated = make_adapter(tiny_source, predicts_lambda=True, **more)
    assert gated.gate is not None
    with torch.no_grad():
        gated.gate.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        gated.gate.bias.fill_(0.5)
    source = tiny_source("llama")
    head = source.lm_head().head
    wanted = [replace(order, explain=True) for order in orders(4) if order.adapter]
    expected = offline(tiny_source, gated, wanted)
    async with World(tiny_plm_folder("llama"), gated) as world:
        answers = await asyncio.gather(*(world.tokens(order) for order in wanted))
    assert [[token.id for token in answer] for answer in answers] == expected
    shares = []
    for order, answer in zip(wanted, answers, strict=True):
        ids = [*order.prompt, *(token.id for token in answer)]
        states = source.extract(ExtractBatch([ids[:-1]], [len(order.prompt) - 1]))
        with torch.inference_mode():
            g = gated.trusted(states, head)
            log_plm = head.log_probs(head.norm(states))
        for step, token in enumerate(answer):
            told = token.explained
            assert told is not None
            lam = order.schedule.at(step, order.length) * float(g[step])
            assert told.lam == pytest.approx(lam, abs=1e-5)
            assert told.log_plm == pytest.approx(float(log_plm[step, token.id]), abs=1e-3)
            mixture = told.lam * math.exp(told.log_pema) + (1 - told.lam) * math.exp(told.log_plm)
            assert math.exp(token.log_prob) == pytest.approx(mixture, rel=1e-4)
            shares.append(float(g[step]))
    assert max(shares) - min(shares) > 0.2  # it does predict something


class Mixture:
    """The exact distribution that answers are sampled from: of the mixture, by temperature and nucleus."""

    def __init__(self, source, adapter: PemaAdapter, lam: float, decoding: Decoding) -> None:
        self._source, self._adapter, self._lam, self._decoding = source, adapter, lam, decoding
        self._head = source.lm_head().head
        self._known: dict[tuple[int, ...], dict[int, float]] = {}

    def after(self, ids: Sequence[int]) -> dict[int, float]:
        """Probabilities of the tokens of the nucleus."""
        if tuple(ids) not in self._known:
            head, d = self._head, self._decoding
            state = self._source.extract(ExtractBatch([list(ids)], [len(ids) - 1]))
            with torch.inference_mode():
                log_pema, log_plm = self._adapter.log_probs(state, head), head.log_probs(head.norm(state))
                scaled = (mix(log_pema, log_plm, torch.tensor([self._lam]))[0] / d.temperature).softmax(-1).double()
            ordered, where = scaled.sort(descending=True)
            nucleus = where[ordered.cumsum(0) - ordered < d.top_p]
            share = scaled[nucleus] / scaled[nucleus].sum()
            self._known[tuple(ids)] = dict(zip(nucleus.tolist(), share.tolist(), strict=True))
        return self._known[tuple(ids)]


class Seer:
    """A memory that guesses from the mixture itself, half of the time; else what is likeliest.

    Attributes:
        expected, variance: of the number of guesses that come true, given what was guessed: a guess comes true with
            the probability that the mixture gives it, if the one before it came true.
    """

    def __init__(self, mixture: Mixture, prompt: Sequence[int], eos: Sequence[int]) -> None:
        self._mixture, self._prompt, self._eos, self._draw = mixture, list(prompt), set(eos), random.Random(0)
        self.expected = self.variance = 0.0
        self.made = 0

    def guesses(self, answer: Sequence[int], most: int) -> list[Guess]:
        ids, tokens, chances = [*self._prompt, *answer], [], [1.0]
        for _ in range(most):
            share = {token: p for token, p in self._mixture.after(ids).items() if token not in self._eos}
            (token,) = self._draw.choices(list(share), list(share.values()))
            if self._draw.random() < 0.5:
                token = max(share, key=lambda known: share[known])
            tokens.append(token)
            chances.append(chances[-1] * share[token])
            ids.append(token)
        mean = sum(chances[1:])  # the first n come true with the n-th chance
        self.expected += mean
        self.variance += sum((2 * n - 1) * chance for n, chance in enumerate(chances[1:], 1)) - mean**2
        self.made += most
        return [Guess("memory", tokens)]


class Memory(Pace):
    """Always bets what the memory guesses, which comes last, in full."""

    def choose(self, offers: Sequence[tuple[Sequence[Guess], int, int]]) -> list[Bet]:
        return [Bet(guesses[-1].kind, tuple(guesses[-1].tokens)) if guesses else Bet() for guesses, _, _ in offers]


@pytest.mark.parametrize("by", ["the PLM", "whim", "a memory"])
async def test_drafted_samples_have_the_distribution_of_the_mixture(tiny_plm_folder, tiny_source, adapter, by):
    """χ² of the second to fourth tokens, after every beginning that is common enough, against the exact mixture."""
    prompt, lam, count = PROMPTS[0], 0.6, 1500
    how: dict[str, Any] = {"temperature": 0.5, "top_p": 0.6}
    mixture = Mixture(tiny_source("llama"), adapter, lam, Decoding("sample", **how))
    seer = Seer(mixture, prompt, tiny_source("llama").describe().eos_token_ids)
    decoding = [Decoding("sample", **how, seed=seed) for seed in range(count)]
    wanted = [Order(prompt, 4, UnrollingSchedule(lam), "mine", 4, decoding=d, draft=2) for d in decoding]
    async with World(tiny_plm_folder("llama"), adapter, slots=64) as world:
        world.unroller.most_drafted = 2
        world.unroller.pace = {"the PLM": _Always, "whim": lambda: Whim(0), "a memory": Memory}[by]()
        if by == "a memory":
            memories: Any = {"mine": seer}
            world.unroller.memories = memories
        answers = [a for begin in range(0, count, 250) for a in await world.all(wanted[begin : begin + 250])]
        counts = world.unroller.counts
    if by == "a memory":
        assert counts["drafted"] == seer.made
        assert seer.expected > 0.1 * seer.made  # many come true, and many do not
        assert seer.expected < 0.6 * seer.made
        assert abs(counts["accepted"] - seer.expected) < 4 * seer.variance**0.5
    chi = freedom = 0.0
    for place in (1, 2, 3):
        begun = Counter(tuple(answer[:place]) for answer in answers if len(answer) > place)
        for begin, seen in begun.items():
            share = mixture.after([*prompt, *begin])
            found = Counter(
                answer[place] for answer in answers if len(answer) > place and tuple(answer[:place]) == begin
            )
            assert set(found) <= set(share)
            common = [token for token, p in share.items() if p * seen >= 5]  # rarer ones are taken together
            cells = [(share[token] * seen, found[token]) for token in common]
            rest = (1 - sum(share[token] for token in common)) * seen, seen - sum(found[token] for token in common)
            cells += [rest] if rest[0] >= 5 else []
            if len(cells) > 1:
                chi += sum((observed - expected) ** 2 / expected for expected, observed in cells)
                freedom += len(cells) - (rest[0] >= 5 or rest[0] < 1e-9)
    assert freedom >= 20
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)  # four standard deviations


class _Always(Pace):
    """Lets the PLM guess every time."""

    def choose(self, offers: Sequence[tuple[Sequence[Guess], int, int]]) -> list[Bet]:
        return [Bet(BY_PLM, (), most) if most else Bet() for _, _, most in offers]
