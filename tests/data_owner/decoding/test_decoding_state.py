"""Adapters that look back decode as one pass predicts, in every branch of a beam search and after lost sessions."""

from __future__ import annotations

import random

import pytest
import torch
from decoding_kit import (
    GREEDY,
    LOOKING,
    PROMPTS,
    SAMPLE,
    Forgetful,
    World,
    answers,
    attributions,
    decoding,
    head_of,
    ids_of,
    make_adapter,
    requests,
    states,
    various,
)

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.data_owner.decoding import SamplingParams
from pema_ray.data_owner.decoding.state import DecodingState
from pema_ray.plm_owner import LoadedPLM

KINDS = pytest.mark.parametrize("kind", LOOKING)
BEAM = SamplingParams("beam", beams=3)


@torch.inference_mode()
def one_pass(plm: LoadedPLM, adapter: PemaAdapter, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """log P_PEMA `[n, V]` of every answered place, from one pass over the whole sequence."""
    ids, first = [*prompt, *tokens], min(adapter.config.prompt_from, len(prompt) - 1)
    state = states(plm, ids[:-1], first)
    target, example = torch.tensor(ids[first + 1 :]), torch.zeros(len(state), dtype=torch.long)
    selected = torch.arange(len(state)) >= len(state) - len(tokens)
    return adapter.log_probs(state, head_of(plm), (target, example, selected), alone=True)


@KINDS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLE, BEAM], ids=lambda s: s.kind)
async def test_answers_are_those_of_whole_passes(tiny_client, tiny_plm, kind: str, sampling: SamplingParams):
    plm = tiny_plm("llama")
    adapter = make_adapter(plm, residual=True, **LOOKING[kind])
    requested = various(sampling=sampling, explain=True)
    for request, answer in zip(requested, await answers(tiny_client("llama"), requested, adapter), strict=True):
        log_p = one_pass(plm, adapter, list(request.prompt), answer.ids)
        expected = log_p[range(len(answer.ids)), answer.ids].tolist()
        assert [a.log_pema for a in attributions(answer)] == pytest.approx(expected, abs=1e-3)


@KINDS
async def test_at_lambda_1_the_likeliest_token_of_a_whole_pass_is_chosen(tiny_client, tiny_plm, kind: str):
    plm = tiny_plm("llama")
    adapter = make_adapter(plm, **{**LOOKING[kind], "predicts_lambda": False})
    for prompt, answer in zip(PROMPTS, await answers(tiny_client("llama"), requests(1.0), adapter), strict=True):
        assert one_pass(plm, adapter, prompt, answer.ids).argmax(-1).tolist() == answer.ids


@KINDS
async def test_nobody_looks_back_at_lambda_0(tiny_client, tiny_plm, kind: str):
    adapter = make_adapter(tiny_plm("llama"), **LOOKING[kind])
    client = tiny_client("llama")
    answered = await answers(client, [*requests(0.0), *requests(adapter=None)], adapter)
    assert ids_of(answered[: len(PROMPTS)]) == ids_of(answered[len(PROMPTS) :])


@KINDS
@pytest.mark.parametrize("sampling", [GREEDY, BEAM], ids=lambda s: s.kind)
async def test_a_lost_session_keeps_the_received_states(tiny_client, tiny_plm, kind, sampling: SamplingParams):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"), **LOOKING[kind])
    requested = requests(0.9, sampling=sampling)
    undisturbed = await answers(client, requested, adapter)
    for every in (1, 3):
        forgetful = Forgetful(client, every)
        assert ids_of(await answers(forgetful, requested, adapter)) == ids_of(undisturbed)  # type: ignore[arg-type]
        assert forgetful.lost > 0


@KINDS
async def test_it_is_served_as_it_is_decoded_offline(tiny_plm_folder, tiny_client, tiny_plm, kind: str):
    """Beside another adapter, with drafts requested and replicas that die."""
    plm = tiny_plm("llama")
    looking, plain, draw = make_adapter(plm, **LOOKING[kind]), make_adapter(plm), random.Random(1)
    async with World(tiny_plm_folder("llama"), looking, replicas=2) as world:

        def before_call(method: str) -> None:
            if method == "step" and draw.random() < 0.05:
                world.kill(draw.choice(sorted(world.handle.replicas)))

        world.handle.before = before_call
        plain_predictor = type(world.decoder.predictors["mine"])(world.decoder.head, plain)
        predictors = {**world.decoder.predictors, "other": plain_predictor}
        world.decoder.predictors = predictors
        requested = [*various(draft=4), *various(sampling=BEAM), *various(adapter="other", draft=4)]
        expected = ids_of(await answers(tiny_client("llama"), requested, predictors))
        assert await world.all(requested) == expected
        assert await world.live_sessions() == 0


@KINDS
@torch.inference_mode()
def test_a_fork_is_independent(tiny_plm, kind: str):
    """After a fork, both states behave like states that were never shared."""
    plm = tiny_plm("llama")
    adapter, head = make_adapter(plm, **LOOKING[kind]), head_of(plm)
    prompt, ways = PROMPTS[0], ([7, 90, 12], [200, 90, 31])

    def begin() -> DecodingState:
        return DecodingState(adapter, head, adapter.enter(states(plm, prompt), head), prompt)

    def follow(state: DecodingState, tokens: list[int]) -> list[torch.Tensor]:
        x, log_probs = adapter.enter(states(plm, [*prompt, *tokens]), head)[len(prompt) - 1 :], []
        for step, token in enumerate(tokens):
            attended = state.step(x[step : step + 1])
            log_probs.append(state.mix(head.log_probs(adapter.leave(adapter.predict(attended), head))))
            state.follow(token)
        return log_probs

    apart = [follow(begin(), tokens) for tokens in ways]
    original = begin()
    fork = original.fork()
    together = [follow(state, tokens) for state, tokens in zip((original, fork), ways, strict=True)]
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(torch.cat(b), torch.cat(a))
    assert not torch.allclose(together[0][1], together[1][1])


async def test_the_prompts_states_are_requested_once_and_only_from_where_they_are_needed(tiny_client, tiny_plm):
    adapter, client, rows = make_adapter(tiny_plm("llama"), **LOOKING["look back"]), tiny_client("llama"), []
    step = client.step

    async def counting(steps):
        rows.append([step.states for step in steps])
        return await step(steps)

    client.step = counting
    async with decoding(client, adapter, eos=[]) as decoder:
        await decoder.generate(requests())
    assert rows[0] == [max(len(prompt) - 2, 1) for prompt in PROMPTS]  # prompt_from is 2
    assert all(set(message) == {1} for message in rows[1:])
