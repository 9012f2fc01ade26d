"""Drafts of any source and length leave answers unchanged, token for token, and samples in distribution."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from decoding_kit import GREEDY, PROMPTS, World, answers, ids_of, make_adapter, mixture, requests, various

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.data_owner.decoding import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.draft_length import BY_PLM, Draft, DraftLengthController
from pema_ray.data_owner.decoding.drafts import DraftCandidate, MemoryLookup
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.plm_owner import LoadedPLM

COLD = SamplingParams("sample", 0.5, 0.9, seed=5)
Offers = Sequence[tuple[Sequence[DraftCandidate], int, int]]


class RandomDrafts(DraftLengthController):
    """Drafts at random: a candidate, the PLM's own draft, nothing, or nonsense."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self.drafts: Counter[str] = Counter()

    def choose(self, offers: Offers) -> list[Draft]:
        return [self._draft(*offer) for offer in offers]

    def _draft(self, candidates: Sequence[DraftCandidate], limit: int, by_plm: int) -> Draft:
        source = self._draw.choice(["candidate", "plm", "nothing", "nonsense"])
        if source == "candidate" and candidates:
            candidate = self._draw.choice(candidates)
            draft = Draft(candidate.kind, tuple(candidate.tokens[: self._draw.randrange(1, limit + 1)]))
        elif source == "plm" and by_plm:
            draft = Draft(BY_PLM, (), self._draw.randrange(1, by_plm + 1))
        elif source == "nonsense" and limit:
            length = self._draw.randrange(1, limit + 1)
            draft = Draft("nonsense", tuple(self._draw.randrange(3, 300) for _ in range(length)))
        else:
            return Draft()
        self.drafts[draft.kind.split()[0]] += 1
        return draft


class AlwaysByPLM(DraftLengthController):
    def choose(self, offers: Offers) -> list[Draft]:
        return [Draft(BY_PLM, (), limit) if limit else Draft() for _, _, limit in offers]


class AlwaysLast(DraftLengthController):
    """Drafts the last candidate in full, which is the memory's."""

    def choose(self, offers: Offers) -> list[Draft]:
        return [Draft(c[-1].kind, tuple(c[-1].tokens)) if c else Draft() for c, _, _ in offers]


@pytest.fixture(scope="module")
def adapter(tiny_plm) -> PemaAdapter:
    return make_adapter(tiny_plm("llama"))


@pytest.fixture
def world_of(tiny_plm_folder, adapter):
    return lambda **settings: World(tiny_plm_folder("llama"), adapter, **settings)


@pytest.fixture
async def expected_of(tiny_client, adapter):
    async def expected(requested: list[GenerationRequest]) -> list[list[int]]:
        plain = [replace(request, draft=0) for request in requested]
        return ids_of(await answers(tiny_client("llama"), plain, adapter))

    return expected


def drafting(draft: int, sampling: SamplingParams = GREEDY) -> list[GenerationRequest]:
    requested = [*various(), *requests(0.3), *requests(0.0), *requests(adapter=None)]
    return [replace(r, draft=draft, sampling=sampling, stream=n, max_new_tokens=25) for n, r in enumerate(requested)]


def memory_of(answered: list[list[int]]) -> MemoryLookup:
    token = np.array([token for answer in answered for token in answer])
    return MemoryLookup(token, np.array([i == 0 for answer in answered for i in range(len(answer))]))


# ── token for token ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("draft", [0, 1, 6])
@pytest.mark.parametrize("sampling", [GREEDY, COLD], ids=lambda s: s.kind)
async def test_drafts_change_no_answer(world_of, expected_of, draft: int, sampling: SamplingParams):
    requested = drafting(draft, sampling)
    async with world_of(slots=16) as world:
        assert await world.all(requested) == await expected_of(requested)
        assert await world.live_sessions() == 0
        counts = world.decoder.counts
        assert counts["replays"] == 0
        assert (counts["drafted"] > 0) == (draft > 0)
        if sampling.kind == "greedy":  # greedy answers repeat themselves, samples do not
            assert (counts["accepted"] > 0) == (draft > 0)
        if not draft:
            steps = [method for method, _ in world.handle.calls if method == "step"]
            assert len(steps) < 0.6 * counts["tokens"]  # many tokens to a message


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", [GREEDY, COLD], ids=lambda s: s.kind)
async def test_any_drafts_change_no_answer_even_when_replicas_die(world_of, expected_of, sampling, seed: int):
    requested = drafting(6, sampling)
    expected, draw = await expected_of(requested), random.Random(seed)
    async with world_of(replicas=2, slots=16) as world:

        def before_call(method: str) -> None:
            if method == "step" and seed and draw.random() < 0.05:
                world.kill(draw.choice(sorted(world.handle.replicas)))

        world.handle.before = before_call
        world.decoder._chooser.draft_length = controller = RandomDrafts(seed)
        world.decoder.memories = {"mine": memory_of(expected)}
        world.decoder.allow_plm_drafts(6)
        assert await world.all(requested) == expected
        assert {"plm", "nonsense", "memory"} <= controller.drafts.keys()
        assert world.decoder.counts["accepted"] > 0
        assert await world.live_sessions() == 0


async def test_drafts_in_lockstep_change_no_answer(tiny_client, adapter, expected_of):
    requested = drafting(6)
    assert ids_of(await answers(tiny_client("llama"), requested, adapter)) == await expected_of(requested)


async def test_a_memory_of_the_right_answers_saves_most_round_trips(world_of, expected_of):
    requested = [request for request in drafting(8) if request.adapter]
    expected, trips = await expected_of(requested), []
    for memories in ({}, {"mine": memory_of(expected)}):
        async with world_of() as world:
            world.decoder.memories = memories
            assert [(await world.all([request]))[0] for request in requested] == expected
            trips.append(world.decoder.counts["round_trips"])
    assert trips[1] < 0.8 * trips[0]


async def test_where_round_trips_are_long_the_plm_owner_drafts_too(world_of, expected_of):
    requested = replace(requests(0.0)[0], max_new_tokens=40, draft=8)  # λ = 0: the PLM's drafts are always right
    (expected,) = await expected_of([requested])
    async with world_of() as world:
        world.decoder.allow_plm_drafts(8)
        step = world.line.step

        async def far_away(steps):
            await asyncio.sleep(0.05)
            return await step(steps)

        world.line.step = far_away
        assert await world.all([requested]) == [expected]
        assert world.decoder.counts["round_trips"] < 0.5 * len(expected)


async def test_no_draft_reaches_beyond_the_longest_answer(world_of, adapter):
    """Else the PLM owner would refuse a text that has room for the answer alone."""
    prompt = PROMPTS[2]
    requested = replace(requests(0.0)[2], max_new_tokens=30 - len(prompt), draft=16)
    async with world_of(max_tokens=30) as world:
        world.decoder.allow_plm_drafts(16)
        for controller in (AlwaysByPLM(), RandomDrafts(1), DraftLengthController()):
            world.decoder._chooser.draft_length = controller
            (answer,) = await world.all([requested])
            assert len(answer) == 30 - len(prompt) or answer[-1] == 1


# ── in distribution ─────────────────────────────────────────────────────────


class Mixture:
    """The exact sampling distribution: the mixture after temperature and nucleus."""

    def __init__(self, plm: LoadedPLM, adapter: PemaAdapter, lam: float, sampling: SamplingParams) -> None:
        self._parts, self._sampling = (plm, adapter), sampling
        self._lam, self._cache = lam, dict[tuple[int, ...], dict[int, float]]()

    def next_tokens(self, ids: Sequence[int]) -> dict[int, float]:
        """Probabilities of the tokens of the nucleus."""
        if tuple(ids) not in self._cache:
            log_p = mixture(*self._parts, ids, self._lam)
            scaled = (log_p / self._sampling.temperature).softmax(-1).double()
            ordered, where = scaled.sort(descending=True)
            nucleus = where[ordered.cumsum(0) - ordered < self._sampling.top_p]
            share = scaled[nucleus] / scaled[nucleus].sum()
            self._cache[tuple(ids)] = dict(zip(nucleus.tolist(), share.tolist(), strict=True))
        return self._cache[tuple(ids)]


class DrawnMemory:
    """A memory that drafts a draw from the mixture half of the time, else the likeliest token.

    Attributes:
        expected, variance: of the number of accepted draft tokens, given the drafts: if its predecessor was accepted, a
            token is accepted with its probability under the mixture.
    """

    def __init__(self, exact: Mixture, prompt: Sequence[int], eos: Sequence[int]) -> None:
        self._exact, self._prompt, self._eos, self._draw = exact, list(prompt), set(eos), random.Random(0)
        self.expected = self.variance = 0.0
        self.drafted = 0

    def candidates(self, answer: Sequence[int], limit: int) -> list[DraftCandidate]:
        ids, tokens, chances = [*self._prompt, *answer], [], [1.0]
        for _ in range(limit):
            share = {token: p for token, p in self._exact.next_tokens(ids).items() if token not in self._eos}
            (token,) = self._draw.choices(list(share), list(share.values()))
            if self._draw.random() < 0.5:
                token = max(share, key=lambda token_id: share[token_id])
            tokens.append(token)
            chances.append(chances[-1] * share[token])
            ids.append(token)
        mean = sum(chances[1:])  # the first n are accepted with the n-th chance
        self.expected += mean
        self.variance += sum((2 * n - 1) * chance for n, chance in enumerate(chances[1:], 1)) - mean**2
        self.drafted += limit
        return [DraftCandidate("memory", tokens)]


@pytest.mark.parametrize("by", ["the PLM", "chance", "a memory"])
async def test_drafted_samples_have_the_distribution_of_the_mixture(world_of, tiny_plm, adapter, by: str):
    """χ² of the second to fourth tokens, after every common beginning, against the exact mixture."""
    prompt, lam, count, how = PROMPTS[0], 0.6, 1500, SamplingParams("sample", 0.5, 0.6)
    exact = Mixture(tiny_plm("llama"), adapter, lam, how)
    request = GenerationRequest(prompt, 4, UnrollingSchedule(lam), "mine", 4, draft=2)
    requested = [replace(request, sampling=replace(how, seed=seed)) for seed in range(count)]
    async with world_of(slots=64) as world:
        drawn = DrawnMemory(exact, prompt, world.decoder._chooser._eos)
        world.decoder.allow_plm_drafts(2)
        controllers = {"the PLM": AlwaysByPLM(), "chance": RandomDrafts(0), "a memory": AlwaysLast()}
        world.decoder._chooser.draft_length = controllers[by]
        if by == "a memory":
            memories: Any = {"mine": drawn}
            world.decoder.memories = memories
        answered = [a for begin in range(0, count, 250) for a in await world.all(requested[begin : begin + 250])]
        counts = world.decoder.counts
    if by == "a memory":
        assert counts["drafted"] == drawn.drafted
        assert 0.25 < drawn.expected / drawn.drafted < 0.75  # many are accepted and many rejected: .6
        assert abs(counts["accepted"] - drawn.expected) < 4 * drawn.variance**0.5
    chi, freedom = chi_squared(answered, exact, prompt)
    assert freedom >= 20
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)  # four standard deviations


def chi_squared(answered: list[list[int]], exact: Mixture, prompt: Sequence[int]) -> tuple[float, int]:
    """χ² and its degrees of freedom, over all beginnings of one to three tokens."""
    chi, freedom = 0.0, 0
    for place in (1, 2, 3):
        longer = [answer for answer in answered if len(answer) > place]
        for begin, count in Counter(tuple(answer[:place]) for answer in longer).items():
            share = exact.next_tokens([*prompt, *begin])
            follows = Counter(answer[place] for answer in longer if tuple(answer[:place]) == begin)
            assert set(follows) <= set(share)
            common = [token for token, p in share.items() if p * count >= 5]  # rarer ones are taken together
            cells = [(share[token] * count, follows[token]) for token in common]
            rare = (1 - sum(share[token] for token in common)) * count, count - sum(follows[token] for token in common)
            cells += [rare] if rare[0] >= 5 else []
            if len(cells) > 1:
                chi += sum((observed - expected) ** 2 / expected for expected, observed in cells)
                freedom += len(cells) - (rare[0] >= 5 or rare[0] < 1e-9)
    return chi, freedom
