"""Samples follow the mixture, and each depends on its seed and stream alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decoding_kit import PROMPTS, answers, ids_of, make_adapter, mixture, requests

from pema_ray.data_owner.decoding import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule


def hot(seed: int) -> SamplingParams:
    return SamplingParams("sample", temperature=2.0, seed=seed)


async def test_a_seed_and_a_stream_name_a_sample(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))

    async def drawn(seed: int, streams: list[int]) -> list[tuple[int, ...]]:
        requested = [replace(requests()[0], sampling=hot(seed), stream=stream) for stream in streams]
        return [tuple(ids) for ids in ids_of(await answers(client, requested, adapter))]

    first = await drawn(3, [0, 1, 2])
    assert len(set(first)) == 3
    assert await drawn(3, [2, 0, 1, 0]) == [first[2], first[0], first[1], first[0]]
    assert set(await drawn(4, [0, 1, 2])).isdisjoint(first)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("draft", [0, 5])
async def test_draws_depend_on_no_batch_no_draft_and_no_timing(tiny_client, tiny_plm, lockstep: bool, draft: int):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    sampling = SamplingParams("sample", temperature=0.4, top_p=0.9, seed=7)
    requested = requests(0.6, sampling=sampling, max_new_tokens=25)
    alone = [(await answers(client, [request], adapter))[0].ids for request in requested]
    company = [replace(r, draft=draft) for r in [*requests(), *requested, *requests(sampling=hot(1))]]
    for size in (2, 16) if lockstep else (16,):
        answered = ids_of(await answers(client, company, adapter, lockstep=lockstep, max_sequences=size))
        assert answered[4:8] == alone


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.6), (0.8, 0.9)])
async def test_samples_follow_the_mixture(tiny_client, tiny_plm, temperature: float, top_p: float):
    """Total variation of n draws over k tokens stays under ½√(k/n) + √(ln(1/δ)/2n), but for a chance of δ."""
    plm, draws, delta, lam = tiny_plm("gpt2"), 2000, 1e-6, 0.4
    adapter = make_adapter(plm)
    p = (mixture(plm, adapter, PROMPTS[0], lam).double() / temperature).softmax(-1)
    ordered, place = p.sort(descending=True)
    kept = int((ordered.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(p)  # the smallest set that holds top_p
    expected = torch.zeros_like(p)
    expected[place[:kept]] = ordered[:kept] / ordered[:kept].sum()
    request = GenerationRequest(PROMPTS[0], 1, UnrollingSchedule(lam), "mine")
    requested = [
        replace(request, sampling=SamplingParams("sample", temperature, top_p), stream=n) for n in range(draws)
    ]
    answered = await answers(tiny_client("gpt2"), requested, adapter, max_sequences=32)
    frequency = torch.bincount(torch.tensor([a.ids[0] for a in answered]), minlength=len(p)) / draws
    assert not frequency[expected == 0].any()
    bound = 0.5 * math.sqrt(kept / draws) + math.sqrt(math.log(1 / delta) / (2 * draws))
    assert float((frequency - expected).abs().sum()) / 2 < bound


async def test_a_narrow_nucleus_and_a_low_temperature_are_greedy(tiny_client, tiny_plm):
    """Log-probabilities are those of the mixture, not of what was drawn from."""
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    greedy = await answers(client, requests(), adapter)
    for sampling in (SamplingParams("sample", top_p=1e-6), SamplingParams("sample", temperature=1e-3, top_p=0.5)):
        answered = await answers(client, requests(sampling=sampling), adapter)
        assert ids_of(answered) == ids_of(greedy)
        assert [a.log_prob for a in answered] == pytest.approx([a.log_prob for a in greedy])
