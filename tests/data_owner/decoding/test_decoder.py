"""The decoder answers as the PLM at λ = 0, as the adapter at λ = 1, and independently of its other answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from decoding_kit import (
    BEAM,
    GREEDY,
    PROMPTS,
    SAMPLE,
    STEPS,
    answers,
    attributions,
    decoding,
    distributions,
    ids_of,
    make_adapter,
    mixture,
    requests,
    transformers_answers,
    various,
)

from pema_ray.data_owner.decoding import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError

THREE = pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])


# ── λ = 0 and λ = 1 ─────────────────────────────────────────────────────────


async def test_lambda_0_is_the_plms_own_greedy_answer(tiny_client, tiny_plm, architecture: str):
    plm = tiny_plm(architecture)
    client, adapter = tiny_client(architecture), make_adapter(plm)
    expected = transformers_answers(plm)
    longest = max(expected, key=len)
    eos = longest[len(longest) // 2]  # a token that occurs
    ending = transformers_answers(plm, eos)
    for requested in (requests(0.0), requests(0.9, adapter=None)):
        assert ids_of(await answers(client, requested, adapter)) == expected
        answered = await answers(client, requested, adapter, eos=[eos])
        assert ids_of(answered) == ending != expected
        assert "eos" in [answer.finish for answer in answered]


async def test_received_representations_are_counted(tiny_client, tiny_plm):
    adapter = make_adapter(tiny_plm("llama"))
    async with decoding(tiny_client("llama"), adapter) as decoder:
        greedy = await decoder.generate(requests())
        assert decoder.counts["received_rows"] == sum(len(answer.tokens) for answer in greedy)
    async with decoding(tiny_client("llama"), adapter, eos=[]) as decoder:
        await decoder.generate(requests(sampling=BEAM))
        assert decoder.counts["received_rows"] == len(PROMPTS) * (1 + 3 * (STEPS - 1))


@THREE
async def test_lambda_1_is_the_adapters_greedy_answer(tiny_client, tiny_plm, name: str):
    plm = tiny_plm(name)
    adapter = make_adapter(plm)
    answered = await answers(tiny_client(name), requests(1.0), adapter)
    for prompt, answer in zip(PROMPTS, answered, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + STEPS and ids[-1] != 1:
            ids.append(int(distributions(plm, adapter, ids)[0].argmax()))
        assert answer.ids == ids[len(prompt) :]
    assert ids_of(answered) != transformers_answers(plm)


@THREE
async def test_an_answer_in_between_is_greedy_on_the_mixture(tiny_client, tiny_plm, name: str):
    plm, requested = tiny_plm(name), various()
    adapter = make_adapter(plm)
    for request, answer in zip(requested, await answers(tiny_client(name), requested, adapter), strict=True):
        ids = list(request.prompt)
        for step, token in enumerate(answer.tokens):
            log_p = mixture(plm, adapter, ids, request.schedule.at(step, request.length))
            assert token.id == int(log_p.argmax())
            assert token.log_prob == pytest.approx(float(log_p.max()), abs=1e-4)
            ids.append(token.id)
        assert answer.log_prob == pytest.approx(sum(token.log_prob for token in answer.tokens))


# ── batches ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLE, BEAM], ids=lambda s: s.kind)
@THREE
async def test_a_request_has_the_same_answer_alone_and_in_a_batch(
    tiny_client, tiny_plm, name: str, sampling: SamplingParams
):
    client, adapter, requested = tiny_client(name), make_adapter(tiny_plm(name)), various(sampling=sampling)
    together = await answers(client, requested, adapter)
    assert len({len(answer.ids) for answer in together}) > 2
    for request, answer in zip(requested, together, strict=True):
        (alone,) = await answers(client, [request], adapter)
        assert (alone.ids, alone.text, alone.finish) == (answer.ids, answer.text, answer.finish)
        assert alone.log_prob == pytest.approx(answer.log_prob, abs=1e-3)


def mixed_requests() -> list[GenerationRequest]:
    """Every kind of decoding in one list, twice."""
    kinds = [*various(), *requests(0.7, sampling=SAMPLE), *requests(0.6, sampling=BEAM)]
    return [replace(request, explain=True) for request in kinds * 2]


async def test_lockstep_gives_the_same_bits_every_time(tiny_client, tiny_plm):
    adapter, requested = make_adapter(tiny_plm("llama")), mixed_requests()
    first, second = [await answers(tiny_client("llama"), requested, adapter, max_sequences=7) for _ in range(2)]
    assert [answer.tokens for answer in first] == [answer.tokens for answer in second]  # log-probabilities among them


async def test_the_batch_size_changes_no_answer_in_lockstep(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    requested = [*mixed_requests(), *requests(0.4, draft=4)]
    expected = await answers(client, requested, adapter, max_sequences=24)
    for size in (1, 5):  # beam search takes more than one, and is decoded all the same
        answered = await answers(client, requested, adapter, max_sequences=size)
        assert [(a.ids, a.text, a.finish) for a in answered] == [(a.ids, a.text, a.finish) for a in expected]


async def test_no_more_sequences_than_allowed_are_decoded_together(tiny_client, tiny_plm):
    client, sent = tiny_client("llama"), []
    step = client.step

    async def counting(steps):
        sent.append(len(steps))
        return await step(steps)

    client.step = counting
    requested = [*requests(), *requests(sampling=BEAM), *requests()]
    await answers(client, requested, make_adapter(tiny_plm("llama")), max_sequences=5)
    assert max(sent) == 5


async def test_no_session_stays_open(tiny_client, tiny_plm):
    client = tiny_client("llama")
    await answers(client, mixed_requests(), make_adapter(tiny_plm("llama")), max_sequences=10)
    engine = await client.engine()
    for _ in range(100):
        if not engine.batcher.live_sessions:
            break
        await asyncio.sleep(0.02)
    assert engine.batcher.live_sessions == 0


# ── endings ─────────────────────────────────────────────────────────────────


async def test_an_answer_ends_at_max_new_tokens(tiny_client, tiny_plm):
    requested = [replace(r, max_new_tokens=n) for r, n in zip(requests(), (1, 4, 9, 14), strict=True)]
    client = tiny_client("llama")
    answered = await answers(client, requested, make_adapter(tiny_plm("llama")), eos=[])
    assert [len(answer.ids) for answer in answered] == [1, 4, 9, 14]
    assert {answer.finish for answer in answered} == {"length"}
    tokenizer = (await client.lm_head()).tokenizer()
    assert [answer.text for answer in answered] == [tokenizer.decode(answer.ids) for answer in answered]


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "beam"])
async def test_any_eos_id_ends_an_answer_and_is_not_in_its_text(tiny_client, tiny_plm, kind: str, lockstep: bool):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    requested = requests(sampling=SamplingParams(kind, beams=1))  # type: ignore[arg-type]
    tokenizer = (await client.lm_head()).tokenizer()
    free = await answers(client, requested, adapter, eos=[])
    eos = [free[0].ids[3], free[1].ids[5]]
    assert all(tokenizer.text_bytes(token) for token in eos)  # they have a text, which would show
    ended = await answers(client, requested, adapter, eos, lockstep=lockstep)
    for answer, plain in zip(ended, free, strict=True):
        ends = [at for at, token in enumerate(plain.ids) if token in eos]
        if ends:
            assert answer.finish == "eos" and answer.ids == plain.ids[: ends[0] + 1]
            assert answer.text == tokenizer.decode(answer.ids[:-1])
        else:
            assert (answer.finish, answer.ids) == ("length", plain.ids)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "beam"])
async def test_a_stop_string_ends_an_answer_and_is_cut_from_its_text(tiny_client, tiny_plm, kind: str, lockstep: bool):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    request = requests(sampling=SamplingParams(kind, beams=1))[0]  # type: ignore[arg-type]
    (free,) = await answers(client, [request], adapter, eos=[])
    begin = len(free.text) - len(free.text.lstrip("\n "))
    stop = free.text[begin + 4 : begin + 7]  # spans several tokens
    stopping = replace(request, stop=("never there", stop))
    (answer,) = await answers(client, [stopping], adapter, eos=[], lockstep=lockstep)
    assert answer.finish == "stop" and answer.text == free.text[: free.text.index(stop, begin)]
    assert answer.ids == free.ids[: len(answer.ids)]
    shorter = (await client.lm_head()).tokenizer().decode(answer.ids[:-1])
    assert stop not in shorter[begin:]  # it stopped at the first token that completed it


# ── refusals ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("lockstep", [True, False])
async def test_texts_too_long_and_unknown_adapters_are_refused(tiny_client, tiny_plm, lockstep: bool):
    client, adapter = tiny_client("llama", max_tokens=30), make_adapter(tiny_plm("llama"))
    async with decoding(client, adapter, lockstep=lockstep) as decoder:
        with pytest.raises(UserError, match="31 tokens is longer than"):
            await decoder.generate([*requests()[:2], replace(requests()[0], prompt=[0] * 31)])
        with pytest.raises(UserError, match="no adapter 'yours'; loaded are: mine"):
            await decoder.generate(requests(adapter="yours"))
        assert decoder.live == 0
        assert len(await decoder.generate(requests())) == len(PROMPTS)  # and it continues


async def test_an_adapter_that_is_replaced_does_not_change_answers_that_have_begun(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    request = requests()[0]
    (expected,) = await answers(client, [request], adapter)
    async with decoding(client, adapter, lockstep=False) as decoder:
        ids = []
        async for token in decoder.answer(request):
            ids.append(token.id)
            decoder.predictors = {}
        assert ids == expected.ids
        with pytest.raises(UserError, match="loaded are: none"):
            await decoder.generate([request])


async def test_one_predictor_that_fails_ends_its_own_answers_alone(tiny_client, tiny_plm):
    """Its answers end with its error; the others of the batch get the same tokens as without it."""
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    expected = await answers(client, requests(), adapter)
    for method in ("distribution", "begin"):
        async with decoding(client, adapter) as decoder:
            broken = type(decoder.predictors["mine"])(
                decoder.head, make_adapter(tiny_plm("llama"), local_memory_width=8)
            )
            setattr(broken, method, lambda *_: 1 / 0)
            decoder.predictors = {**decoder.predictors, "broken": broken}
            failing = decoder.generate(requests(adapter="broken"))
            answered, error = await asyncio.gather(decoder.generate(requests()), failing, return_exceptions=True)
        assert isinstance(error, ZeroDivisionError)
        assert not isinstance(answered, BaseException) and ids_of(answered) == ids_of(expected)


async def test_a_schedule_that_reaches_zero_leaves_the_rest_to_the_plm(tiny_client, tiny_plm):
    """While other answers of the batch continue to mix."""
    plm = tiny_plm("llama")
    adapter = make_adapter(plm)
    falling = replace(requests()[0], schedule=UnrollingSchedule(0.9, "linear"), length=3, explain=True)
    answer, _ = await answers(tiny_client("llama"), [falling, requests(1.0)[1]], adapter)
    assert [a.lam for a in attributions(answer)][:4] == pytest.approx([0.9, 0.6, 0.3, 0.0])
    ids = [*falling.prompt, *answer.ids[:3]]
    for token in answer.ids[3:]:
        assert token == int(distributions(plm, adapter, ids)[1].argmax())
        ids.append(token)
    assert torch.tensor([a.log_pema for a in attributions(answer)]).isfinite().all()
