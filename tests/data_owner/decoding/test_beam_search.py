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
    own_generate,
    requests,
    states,
)

from pema_ray.data_owner.decoding import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix

THREE = pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt_without_final_norm", "llama", "qwen3", "gemma2", "cohere"])
async def test_beams_at_lambda_0_are_transformers_own(tiny_client, tiny_plm, name: str):
    plm = tiny_plm(name)
    client, adapter = tiny_client(name), make_adapter(plm)
    longest = max(own_generate(plm), key=len)
    eos = longest[min(4, len(longest) - 1)]
    for penalty in (0.0, 1.0, 2.0):
        expected = own_generate(plm, eos, num_beams=3, length_penalty=penalty, early_stopping=False)
        sampling = SamplingParams("beam", beams=3, length_penalty=penalty)
        assert ids_of(await answers(client, requests(0.0, sampling=sampling), adapter, eos=[eos])) == expected


async def test_one_beam_is_greedy_wherever_eos_stands(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    free = await answers(client, requests(), adapter, eos=[])
    one = SamplingParams("beam", beams=1)
    for eos in sorted({token for answer in free for token in answer.ids})[::3]:
        found = await answers(client, [*requests(), *requests(sampling=one)], adapter, eos=[eos])
        told = [(a.ids, a.text, a.finish) for a in found]
        assert told[: len(PROMPTS)] == told[len(PROMPTS) :]


async def test_as_many_beams_as_tokens_find_the_best_answer_of_two(tiny_client, tiny_plm):
    plm, prompt, eos = tiny_plm("llama"), PROMPTS[1], 300
    head, adapter, schedule = head_of(plm), make_adapter(plm), UnrollingSchedule(0.8, "linear")
    V = head.vocab_size
    first = mixture(plm, adapter, prompt, schedule.at(0, 4))
    state = torch.cat([states(plm, [*prompt, token], len(prompt)) for token in range(V)])
    with torch.inference_mode():
        own, plain = adapter.log_probs(state, head), head.log_probs(head.norm(state))
    both = first[:, None] + mix(own, plain, torch.full((V,), schedule.at(1, 4)))
    both[eos] = -math.inf
    request = GenerationRequest(prompt, 2, schedule, "mine", 4)
    wide = GenerationRequest(prompt, 2, schedule, "mine", 4, SamplingParams("beam", beams=V, length_penalty=0.0))
    best, greedy = await answers(tiny_client("llama", slots=V, max_tokens=8), [wide, request], adapter, eos=[eos])
    assert best.log_prob == pytest.approx(max(float(both.max()), float(first[eos])), abs=1e-4)
    assert tuple(best.ids) == divmod(int(both.argmax()), V)
    assert best.log_prob >= greedy.log_prob - 1e-4


@THREE
async def test_a_beams_score_is_its_own_and_better_than_greedys_here(tiny_client, tiny_plm, name: str):
    """Beam search may lose the greedy path; over these fixed prompts it finds better answers."""
    plm = tiny_plm(name)
    client, adapter = tiny_client(name), make_adapter(plm)
    beams = await answers(client, requests(0.6, sampling=SamplingParams("beam", beams=4)), adapter, eos=[])
    for prompt, beam in zip(PROMPTS, beams, strict=True):
        own, plm_log_p = distributions(plm, adapter, [*prompt, *beam.ids[:-1]], len(prompt) - 1)
        log_p = mix(own, plm_log_p, torch.full((STEPS,), 0.6)).gather(1, torch.tensor(beam.ids)[:, None])
        assert [token.log_prob for token in beam.tokens] == pytest.approx(log_p[:, 0].tolist(), abs=1e-3)
    greedy = await answers(client, requests(0.6), adapter, eos=[])
    assert sum(beam.log_prob for beam in beams) > sum(answer.log_prob for answer in greedy)


async def test_beams_that_end_free_their_sessions_while_the_search_goes_on(tiny_client, tiny_plm):
    """K sessions are enough: a forked beam takes the slot of one that ended, and copies its cache."""
    adapter, sampling = make_adapter(tiny_plm("llama")), SamplingParams("beam", beams=3)
    plenty = await answers(tiny_client("llama"), requests(sampling=sampling), adapter)
    scarce = tiny_client("llama", slots=3, idle_seconds=60.0, timeout_seconds=5.0)
    async with decoding(scarce, adapter, max_sequences=3) as decoder:
        assert ids_of(await decoder.generate(requests(sampling=sampling))) == ids_of(plenty)
        assert decoder.counts["replays"] == decoder.counts["busy"] == 0


async def test_beams_text_is_written_once_for_each_token(tiny_client, tiny_plm):
    """A fork copies what its text has come to and does not detokenise it again: the search is linear in its length."""
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
