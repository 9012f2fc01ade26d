"""Beam search finds what transformers finds at λ = 0, and scores hypotheses by the mixture."""

from __future__ import annotations

import math

import pytest
import torch
from decoding_kit import (
    PROMPTS,
    STEPS,
    answers,
    decoding,
    distributions,
    head_of,
    ids_of,
    make_adapter,
    mixture,
    requests,
    states,
    transformers_answers,
)

from pema_ray.data_owner.decoding import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix

THREE = pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt_without_final_norm", "llama", "qwen3", "gemma2", "cohere"])
async def test_beams_at_lambda_0_are_transformers_own(tiny_client, tiny_plm, name: str):
    plm = tiny_plm(name)
    client, adapter = tiny_client(name), make_adapter(plm)
    longest = max(transformers_answers(plm), key=len)
    eos = longest[min(4, len(longest) - 1)]
    for penalty in (0.0, 1.0, 2.0):
        expected = transformers_answers(plm, eos, num_beams=3, length_penalty=penalty, early_stopping=False)
        sampling = SamplingParams("beam", beams=3, length_penalty=penalty)
        assert ids_of(await answers(client, requests(0.0, sampling=sampling), adapter, eos=[eos])) == expected


async def test_one_beam_is_greedy_wherever_eos_stands(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    free = await answers(client, requests(), adapter, eos=[])
    one_beam = SamplingParams("beam", beams=1)
    for eos in sorted({token for answer in free for token in answer.ids})[::3]:
        answered = await answers(client, [*requests(), *requests(sampling=one_beam)], adapter, eos=[eos])
        outcomes = [(a.ids, a.text, a.finish) for a in answered]
        assert outcomes[: len(PROMPTS)] == outcomes[len(PROMPTS) :]


async def test_as_many_beams_as_tokens_find_the_best_answer_of_two(tiny_client, tiny_plm):
    plm, prompt, eos = tiny_plm("llama"), PROMPTS[1], 300
    head, adapter, schedule = head_of(plm), make_adapter(plm), UnrollingSchedule(0.8, "linear")
    V = head.vocab_size
    first_V = mixture(plm, adapter, prompt, schedule.at(0, 4))
    state = torch.cat([states(plm, [*prompt, token], len(prompt)) for token in range(V)])
    with torch.inference_mode():
        log_pema, log_plm = adapter.log_probs(state, head), head.log_probs(head.norm(state))
    pair_VV = first_V[:, None] + mix(log_pema, log_plm, torch.full((V,), schedule.at(1, 4)))
    pair_VV[eos] = -math.inf
    request = GenerationRequest(prompt, 2, schedule, "mine", 4)
    wide = GenerationRequest(prompt, 2, schedule, "mine", 4, SamplingParams("beam", beams=V, length_penalty=0.0))
    best, greedy = await answers(tiny_client("llama", slots=V, max_tokens=8), [wide, request], adapter, eos=[eos])
    assert best.log_prob == pytest.approx(max(float(pair_VV.max()), float(first_V[eos])), abs=1e-4)
    assert tuple(best.ids) == divmod(int(pair_VV.argmax()), V)
    assert best.log_prob >= greedy.log_prob - 1e-4


@THREE
async def test_a_beams_score_is_its_own_and_better_than_greedys_here(tiny_client, tiny_plm, name: str):
    """Beam search may drop the greedy path; for these prompts it finds better answers."""
    plm = tiny_plm(name)
    client, adapter = tiny_client(name), make_adapter(plm)
    beams = await answers(client, requests(0.6, sampling=SamplingParams("beam", beams=4)), adapter, eos=[])
    for prompt, beam in zip(PROMPTS, beams, strict=True):
        log_pema, log_plm = distributions(plm, adapter, [*prompt, *beam.ids[:-1]], len(prompt) - 1)
        log_p = mix(log_pema, log_plm, torch.full((STEPS,), 0.6)).gather(1, torch.tensor(beam.ids)[:, None])
        assert [token.log_prob for token in beam.tokens] == pytest.approx(log_p[:, 0].tolist(), abs=1e-3)
    greedy = await answers(client, requests(0.6), adapter, eos=[])
    assert sum(beam.log_prob for beam in beams) > sum(answer.log_prob for answer in greedy)


async def test_beams_that_end_free_their_sessions_during_the_search(tiny_client, tiny_plm):
    """K sessions suffice: a forked beam takes the slot of an ended one and copies its cache."""
    adapter, sampling = make_adapter(tiny_plm("llama")), SamplingParams("beam", beams=3)
    plenty = await answers(tiny_client("llama"), requests(sampling=sampling), adapter)
    scarce = tiny_client("llama", slots=3, idle_seconds=60.0, timeout_seconds=5.0)
    async with decoding(scarce, adapter, max_sequences=3) as decoder:
        assert ids_of(await decoder.generate(requests(sampling=sampling))) == ids_of(plenty)
        assert decoder.counts["replays"] == decoder.counts["busy"] == 0


async def test_each_token_of_a_beam_is_detokenised_once(tiny_client, tiny_plm):
    """A fork copies its text instead of detokenising it again, so the search is linear in its length."""
    sampling, calls = SamplingParams("beam", beams=2), []
    for steps in (10, 40):
        async with decoding(tiny_client("llama"), make_adapter(tiny_plm("llama")), eos=[]) as decoder:
            spell, count = decoder._tokenizer.text_bytes, [0]

            def counting(token: int, spell=spell, count=count) -> bytes:
                count[0] += 1
                return spell(token)

            decoder._tokenizer.text_bytes = counting
            await decoder.generate(requests(sampling=sampling, max_new_tokens=steps)[:1])
            calls.append(count[0])
    assert calls[1] <= 4.2 * calls[0]
