"""A pass over a text measures what a naive computation, token by token, gives; no token sees what comes after it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.memory.search.nearest import OnePieceSearch, SearchResult
from pema_ray.trime.evaluation.calibration import Mixture, Settings, token_log_probs
from pema_ray.trime.evaluation.recent import RecentKeys
from pema_ray.trime.evaluation.statistics import Probe, Text, measure, walk
from pema_ray.trime.text.windows import plan_windows
from tests.trime.kit import VOCABULARY, keys_of, part_of, tiny_model

TAUS, TEMPS, SIZES, KS = (0.7, 1.0, 2.0), (1.0, 4.0), (0, 3, 11, 40), (2, 7)


def probe(**changes) -> Probe:
    plain = {"tokens_per_sample": 12, "context_window": 5, "batch_windows": 3, "sizes": SIZES, "taus": TAUS}
    return Probe(**{**plain, "neighbours": KS, "interp_temps": TEMPS, **changes})


def text(count: int = 61, seed: int = 0, documents: bool = False) -> Text:
    torch.manual_seed(seed)
    token_N = torch.randint(0, VOCABULARY, (count,))
    return Text(token_N, torch.arange(count) // 17 if documents else None)


@given(st.integers(2, 80), st.integers(1, 20), st.integers(0, 30))
def test_every_token_is_scored_once_and_windows_overlap_as_configured(tokens: int, new: int, context: int):
    windows = plan_windows(tokens, new + context, context)
    scored = [position for w in windows for position in range(w.first, w.end)]
    assert scored == list(range(tokens - 1))
    for window in windows:
        assert window.start == max(0, window.first - context)
        assert window.length <= new + context


@pytest.mark.parametrize(("tokens", "length", "context"), [(50, 8, 8), (50, 8, -1), (1, 8, 4)])
def test_windows_that_can_score_nothing_are_refused(tokens, length, context):
    with pytest.raises(UserError, match=r"evaluate: .*(no room for new tokens|at least two)"):
        plan_windows(tokens, length, context)


def test_windows_longer_than_the_model_are_refused():
    with pytest.raises(UserError, match="the model allows 24"):
        list(walk(tiny_model(max_positions=24), text(), probe(tokens_per_sample=25)))


@given(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=25))
def test_recent_keys_are_the_last_ones_in_order(capacity: int, lengths: list[int]):
    recent, everything = RecentKeys(capacity, 1), torch.zeros(0, 1)
    for length in lengths:
        new = torch.arange(len(everything), len(everything) + length).float()[:, None]
        everything = torch.cat([everything, new])
        recent.append(new)
        assert recent.end == len(everything)
        assert recent.begin == max(0, len(everything) - capacity)
        assert torch.equal(recent.between(recent.begin, recent.end), everything[recent.begin :])


# ── against a naive computation ─────────────────────────────────────────────


@torch.no_grad()
def naive(model, given: Text, p: Probe, mixture: Mixture, s: Settings, store=None) -> tuple[list[float], list[float]]:
    """log P of every token, and the whole distribution's sum, in float64, from the definitions."""
    log_p, sums, key_at = [], [], {}
    for window in plan_windows(len(given.token_N), p.tokens_per_sample, p.context_window):
        states, keys = model.represent(given.token_N[None, window.start : window.end])
        vectors = (keys if p.vectors == "key" else states)[0].double()
        log_p_TV, norm_T = (x.double() for x in model.log_probs(states[0]))
        until = window.first if p.count_context_twice else window.start
        for i in range(window.first, window.end):
            entries = [(vectors[j - window.start], j) for j in range(window.start, i)]
            entries += [(key_at[j], j) for j in range(max(0, until - mixture.size), until)]
            if p.reset_at_documents:
                document = given.document_N
                entries = [e for e in entries if document[e[1] + 1] == document[i + 1]]
            query = vectors[i - window.start]
            memory = [(float(query @ key), int(given.token_N[j + 1])) for key, j in entries]
            near = []
            if store is not None:
                key_MH, token_M = store
                similarity_M = keys[0, i - window.start].double() @ key_MH.double().T
                top = similarity_M.topk(mixture.neighbours)
                near = [(float(v), int(token_M[r])) for v, r in zip(top.values, top.indices)]
            full = mix(
                log_p_TV[i - window.start], norm_T[i - window.start], memory, near, mixture, s, model.hidden_size
            )
            log_p.append(float(full[given.token_N[i + 1]].log()))
            sums.append(float(full.sum()))
        for j in range(window.first, window.end):
            key_at[j] = vectors[j - window.start]
    return log_p, sums


def mix(log_p_V, norm, memory, near, mixture: Mixture, s: Settings, hidden: int):
    theta = s.tau * math.sqrt(hidden)
    p_V = log_p_V.exp()
    joined = memory + (near if mixture.joined else [])
    if mixture.rule == "gn":
        mass_V = p_V * norm.exp()
        for similarity, token in joined:
            mass_V[token] += math.exp(similarity / theta)
        p_V = mass_V / (norm.exp() + sum(math.exp(v / theta) for v, _ in joined))
    elif mixture.rule == "li" and memory:
        p_V = (1 - s.weight) * p_V + s.weight * of_memory(memory, theta)
    if mixture.second:
        p_V = (1 - s.second_weight) * p_V + s.second_weight * of_memory(near, s.interp_temp)
    return p_V


def of_memory(memory, temperature: float):
    mass_V = torch.zeros(VOCABULARY, dtype=torch.float64)
    for similarity, token in memory:
        mass_V[token] += math.exp(similarity / temperature)
    return mass_V / mass_V.sum()


MIXTURES = {
    "vanilla": Mixture("none"),
    "local": Mixture("gn"),
    "long": Mixture("gn", 11),
    "longest": Mixture("gn", 40),
    "cache": Mixture("li", 3),
    "local cache": Mixture("li"),
    "ext": Mixture("gn", 11, joined=True, neighbours=7),
    "ext and kNN": Mixture("gn", 11, joined=True, second=True, neighbours=2),
    "kNN": Mixture("none", second=True, neighbours=7),
    "kNN and cache": Mixture("li", 40, second=True, neighbours=7),
}


@pytest.mark.parametrize("adaptive", [False, True], ids=["softmax", "adaptive"])
@pytest.mark.parametrize("name", MIXTURES)
def test_every_way_of_evaluating_is_what_its_definition_says(name: str, adaptive: bool):
    model, given, mixture = tiny_model(adaptive), text(), MIXTURES[name]
    p, s = probe(), Settings(tau=0.7, weight=0.3, interp_temp=4.0, second_weight=0.2)
    key_MH, token_M = keys_of(90, model.hidden_size, seed=5)
    search = OnePieceSearch([part_of(key_MH, token_M)])
    statistics = measure(model, given, p, search if mixture.external else None)
    assert statistics.position_N.tolist() == list(range(1, 61))
    expected, sums = naive(model, given, p, mixture, s, (key_MH, token_M) if mixture.external else None)
    assert sums == pytest.approx([1.0] * 60, abs=1e-5)  # gn and li are distributions over the whole vocabulary
    assert token_log_probs(statistics, p, mixture, s).tolist() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"vectors": "state"}, {"reset_at_documents": True}, {"count_context_twice": True}, {"context_window": 0},
        {"tokens_per_sample": 70, "context_window": 3}, {"batch_windows": 1}, {"batch_windows": 50},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_options_are_what_their_definitions_say(changes):
    model, given, p = tiny_model(), text(documents=True), probe(**changes)
    for mixture in (Mixture("gn", 0), Mixture("gn", 11), Mixture("li", 40)):
        s = Settings(tau=2.0, weight=0.4)
        expected, _ = naive(model, given, p, mixture, s)
        assert token_log_probs(measure(model, given, p), p, mixture, s).tolist() == pytest.approx(expected, abs=2e-4)


def test_no_later_token_changes_an_earlier_probability():
    model, given, p = tiny_model(), text(), probe()
    key_MH, token_M = keys_of(90, model.hidden_size, seed=5)
    search = OnePieceSearch([part_of(key_MH, token_M)])
    s = Settings(tau=1.0, weight=0.3, interp_temp=1.0, second_weight=0.2)
    before = measure(model, given, p, search)
    for changed in (13, 30, 59):
        token_N = given.token_N.clone()
        token_N[changed] = (token_N[changed] + 1) % VOCABULARY
        after = measure(model, Text(token_N), p, search)
        for mixture in MIXTURES.values():
            old, new = (token_log_probs(x, p, mixture, s)[: changed - 1] for x in (before, after))
            assert torch.allclose(old, new, atol=1e-6)
            assert not torch.allclose(
                *(token_log_probs(x, p, mixture, s)[changed - 1 :] for x in (before, after)), atol=1e-6
            )


def test_context_tokens_enter_the_memory_once():
    """A window's context stands among its local entries, and the long memory ends where the window begins."""
    for batch in walk(tiny_model(), text(), probe()):
        for scored in batch:
            positions = scored.entry_M.tolist()
            assert len(positions) == len(set(positions))
    twice = [s.entry_M.tolist() for b in walk(tiny_model(), text(), probe(count_context_twice=True)) for s in b]
    assert any(len(positions) != len(set(positions)) for positions in twice)


class _Nothing:
    """A datastore whose lists ran out."""

    def __len__(self) -> int:
        return 9

    def search(self, query_NH, k: int) -> SearchResult:
        n = len(query_NH)
        return SearchResult(torch.full((n, k), -torch.inf), torch.full((n, k), -1), torch.full((n, k), -1))


def test_neighbours_that_were_not_found_count_nowhere():
    model, p, s = tiny_model(), probe(), Settings(tau=1.0, interp_temp=1.0, second_weight=0.5)
    statistics = measure(model, text(), p, _Nothing())
    joined = token_log_probs(statistics, p, Mixture("gn", 11, joined=True, second=True, neighbours=7), s)
    assert torch.allclose(joined, token_log_probs(statistics, p, Mixture("gn", 11), s), rtol=1e-12)
