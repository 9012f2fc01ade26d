"""An attribution says which distribution chose a token: the effective λ and both probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from decoding_kit import (
    BEAM,
    GREEDY,
    LOOKING,
    SAMPLE,
    answers,
    attributions,
    distributions,
    head_of,
    ids_of,
    make_adapter,
    requests,
    states,
    various,
)

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.decoding import Answer, Attribution, Predictor, SamplingParams
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import encode


def assert_adds_up(answer: Answer) -> None:
    """Both parts, weighted by λ, sum to the token's probability."""
    for token, a in zip(answer.tokens, attributions(answer), strict=True):
        mixed = a.lam * math.exp(a.log_pema) + (1 - a.lam) * math.exp(a.log_plm)
        assert mixed == pytest.approx(math.exp(token.log_prob), rel=1e-4, abs=1e-8)
        assert (a.decided_by == "pema") == (a.lam * math.exp(a.log_pema) >= mixed / 2)


def assert_same(answered: list[Answer], expected: list[Answer]) -> None:
    assert ids_of(answered) == ids_of(expected)
    for a, b in zip(map(attributions, answered), map(attributions, expected), strict=True):
        for field in ("lam", "log_pema", "log_plm"):
            assert [getattr(x, field) for x in a] == pytest.approx([getattr(x, field) for x in b], abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLE, BEAM], ids=lambda s: s.kind)
async def test_every_token_has_lambda_and_both_probabilities(tiny_client, tiny_plm, sampling: SamplingParams):
    plm, requested = tiny_plm("gpt2"), various(sampling=sampling, explain=True)
    adapter = make_adapter(plm)
    for request, answer in zip(requested, await answers(tiny_client("gpt2"), requested, adapter), strict=True):
        ids = [*request.prompt, *answer.ids]
        log_pema, log_plm = distributions(plm, adapter, ids[:-1], len(request.prompt) - 1)
        token, attributed = torch.tensor(answer.ids)[:, None], attributions(answer)
        assert [a.lam for a in attributed] == pytest.approx(
            [request.schedule.at(step, request.length) for step in range(len(attributed))]
        )
        assert [a.log_pema for a in attributed] == pytest.approx(log_pema.gather(1, token)[:, 0].tolist(), abs=1e-3)
        assert [a.log_plm for a in attributed] == pytest.approx(log_plm.gather(1, token)[:, 0].tolist(), abs=1e-3)
        assert_adds_up(answer)


async def test_it_is_complete_at_lambda_0_and_1_and_changes_no_answer(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    for lam in (0.0, 1.0):
        plain = await answers(client, requests(lam), adapter)
        explained = await answers(client, requests(lam, explain=True), adapter)
        assert ids_of(explained) == ids_of(plain)
        assert all(token.attribution is None for answer in plain for token in answer.tokens)
        for answer in explained:
            attributed = attributions(answer)
            assert sum(a.log_pema if lam else a.log_plm for a in attributed) == pytest.approx(answer.log_prob, abs=1e-4)
            assert all(a.log_pema != a.log_plm for a in attributed)
    (alone,) = await answers(client, requests(adapter=None, explain=True)[:1], adapter)
    assert all(a.lam == 0 and a.log_pema == a.log_plm for a in attributions(alone))


async def test_the_most_probable_tokens_of_each_are_named(tiny_client, tiny_plm):
    plm = tiny_plm("llama")
    adapter, (request,) = make_adapter(plm), requests(0.6, explain=True, top=3)[:1]
    (answer,) = await answers(tiny_client("llama"), [request], adapter)
    ids = [*request.prompt, *answer.ids]
    log_pema, log_plm = distributions(plm, adapter, ids[:-1], len(request.prompt) - 1)
    for step, (token, a) in enumerate(zip(answer.tokens, attributions(answer), strict=True)):
        assert token.top[0] == (token.id, token.log_prob) and len(token.top) == 3
        assert [i for i, _ in a.top_pema] == log_pema[step].topk(3).indices.tolist()
        assert [i for i, _ in a.top_plm] == log_plm[step].topk(3).indices.tolist()


def test_the_larger_share_decides():
    assert Attribution(0.5, math.log(0.4), math.log(0.3)).decided_by == "pema"
    assert Attribution(0.4, math.log(0.4), math.log(0.3)).decided_by == "plm"
    assert Attribution(0.0, 0.0, -9.0).decided_by == "plm"
    assert Attribution(1.0, -9.0, 0.0).decided_by == "pema"
    assert Attribution(0.9, -math.inf, -9.0).decided_by == "plm"


# ── λ that is predicted, and neighbours ─────────────────────────────────────


@pytest.mark.parametrize("settings", [{}, LOOKING["look back"]], ids=["newest", "look back"])
async def test_a_predicted_lambda_is_part_of_lam_and_not_of_log_pema(tiny_client, tiny_plm, settings: dict):
    plm, client = tiny_plm("llama"), tiny_client("llama")
    gated, head, requested = make_adapter(plm, predicts_lambda=True, **settings), head_of(plm), various(explain=True)
    ungated = make_adapter(plm, **settings)
    ungated.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("gate")})
    offline = await answers(client, requested, gated)
    shares = []
    for request, answer in zip(requested, offline, strict=True):
        assert_adds_up(answer)
        first = min(gated.config.prompt_from, len(request.prompt) - 1) if settings else len(request.prompt) - 1
        ids = [*request.prompt, *answer.ids]
        state, target = states(plm, ids[:-1], first), torch.tensor(ids[first + 1 :])
        answered = torch.arange(len(state)) >= len(state) - len(answer.ids)
        sequences = (target, torch.zeros_like(target), answered) if settings else None
        with torch.inference_mode():
            g = gated.predicted_lambda(state[answered], head).tolist()
            alone = ungated.log_probs(state, head, sequences)
            log_plm = head.log_probs(head.norm(state[answered]))
        for step, (token, a) in enumerate(zip(answer.ids, attributions(answer), strict=True)):
            assert a.lam == pytest.approx(request.schedule.at(step, request.length) * g[step], abs=1e-5)
            assert a.log_pema == pytest.approx(float(alone[step, token]), abs=1e-3)
            assert a.log_plm == pytest.approx(float(log_plm[step, token]), abs=1e-3)
        shares += g
    assert max(shares) - min(shares) > 0.2  # the prediction varies
    assert_same(await answers(client, requested, gated, lockstep=False), offline)


@pytest.mark.parametrize("beside", ["nothing", "an adapter", "an adapter that predicts λ"])
async def test_neighbours_are_part_of_lam_and_of_log_pema(tiny_client, tiny_plm, beside: str):
    """s = (1 - w) g + w, and P_own = ((1 - w) g P_PEMA + w P_kNN) / s; without an adapter, P_own = P_kNN."""
    pytest.importorskip("faiss")
    plm, client = tiny_plm("llama"), tiny_client("llama")
    head, requested, weight = head_of(plm), various(explain=True), 0.3
    adapter = None if beside == "nothing" else make_adapter(plm, predicts_lambda="λ" in beside)
    key = states(plm, list(range(3, 90))).float().numpy()
    place = np.arange(len(key))
    rows = MemoryRows(encode(key, "float32"), (place % 7 + 3).astype(np.int32), place, place.astype(np.int32))
    predictor = Predictor(head, adapter, NearestNeighbours(rows, head, 8, 20.0), weight)
    offline = await answers(client, requested, {"mine": predictor})
    for request, answer in zip(requested, offline, strict=True):
        assert_adds_up(answer)
        ids = [*request.prompt, *answer.ids]
        state = states(plm, ids[:-1], len(request.prompt) - 1)
        with torch.inference_mode():
            knn = predictor.neighbours.log_probs(state, head).exp()  # type: ignore[union-attr]
            w, g, p_pema = 1.0, torch.ones(len(state)), torch.zeros_like(knn)
            if adapter is not None:
                w, g = weight, adapter.predicted_lambda(state, head)
                p_pema = adapter.log_probs(state, head, alone=True).exp()
        share = (1 - w) * g + w
        expected = ((1 - w) * g[:, None] * p_pema + w * knn) / share[:, None]
        for step, (token, a) in enumerate(zip(answer.ids, attributions(answer), strict=True)):
            lam = request.schedule.at(step, request.length) * float(share[step])
            assert a.lam == pytest.approx(lam, abs=1e-5)
            assert math.exp(a.log_pema) == pytest.approx(float(expected[step, token]), abs=1e-4)
    assert_same(await answers(client, requested, {"mine": predictor}, lockstep=False), offline)
