"""Exact search equals brute force, for any shards and chunks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.pluglm.memory import search
from pema_ray.pluglm.memory.search import NO_DOCUMENT, KeyTable, RetrievedEntries, exact_scores, merge


def brute_force(query, key, entry, document, k: int, own, cosine: bool) -> tuple[list[list[int]], list[list[float]]]:
    entries, scores = [], []
    for b, q in enumerate(query.double().tolist()):
        ranked = []
        for n, row in enumerate(key.double().tolist()):
            if own is not None and own[b] != NO_DOCUMENT and own[b] == document[n]:
                continue
            score = sum(x * y for x, y in zip(q, row))
            if cosine:
                norms = sum(x * x for x in q) ** 0.5 * sum(x * x for x in row) ** 0.5
                score /= max(norms, 1e-30)
            ranked.append((-score, int(entry[n])))
        ranked = sorted(ranked)[:k]
        ranked += [(torch.inf, -1)] * (k - len(ranked))
        entries.append([entry_id for _, entry_id in ranked])
        scores.append([-score for score, _ in ranked])
    return entries, scores


@st.composite
def tables(draw):
    """Keys of small integers: many are equal, and every score is exact."""
    n, b, k = draw(st.integers(0, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    numbers = st.integers(-3, 3)
    key = torch.tensor(draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=n, max_size=n))).view(n, 3)
    query = torch.tensor(draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=b, max_size=b)))
    entry = torch.tensor(sorted(draw(st.sets(st.integers(0, 99), min_size=n, max_size=n))), dtype=torch.int64)
    document = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), dtype=torch.int64)
    own = draw(st.none() | st.lists(st.integers(0, 6), min_size=b, max_size=b).map(torch.tensor))
    return query.float(), key.float(), entry, document, k, own


@given(tables(), st.booleans(), st.integers(1, 7), st.integers(1, 9), st.sampled_from([torch.float32, torch.float16]))
def test_any_number_of_shards_finds_what_brute_force_finds(table, cosine, shards, chunk, dtype) -> None:
    query, key, entry, document, k, own = table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CHUNK", chunk)
        patch.setattr(search, "_SPARE", 0)
        best = KeyTable(key.to(dtype), entry, document).top(query, k, own, cosine)
        cuts = np.linspace(0, len(key), shards + 1).astype(int)
        parts = [KeyTable(key[a:b], entry[a:b], document[a:b]).top(query, k, own, cosine) for a, b in pairwise(cuts)]
    merged = merge(parts, k)
    assert best.entry_BK.tolist() == merged.entry_BK.tolist()
    assert best.score_BK.tolist() == merged.score_BK.tolist()  # to the bit
    if not cosine:
        assert (best.entry_BK.tolist(), best.score_BK.tolist()) == brute_force(
            query, key, entry, document, k, own, cosine
        )


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_keys_of_any_format_are_found_exactly(cosine: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key, query = torch.randn(300, 16).to(dtype), torch.randn(8, 16)
    entry, document = torch.arange(300) * 3, torch.arange(300) // 4 + 1
    own = torch.arange(8) + 1
    best = KeyTable(key, entry, document).top(query, 5, own, cosine)
    entries, scores = brute_force(query, key, entry, document, 5, own, cosine)
    assert best.entry_BK.tolist() == entries
    assert np.allclose(best.score_BK, scores, rtol=1e-12)


def test_keys_that_differ_by_less_than_float32_sees_are_told_apart(monkeypatch) -> None:
    """The rough product may order them either way; a second look must take in all of them."""
    monkeypatch.setattr(search, "_SPARE", 1)
    torch.manual_seed(0)
    base = torch.randn(64)
    key = (base + torch.randn(200, 64).sign() * 2e-7).float()
    query = torch.randn(4, 64) * 50
    best = KeyTable(key, torch.arange(200), torch.zeros(200, dtype=torch.int64)).top(query, 3)
    exact = exact_scores(query, key.expand(4, -1, -1), False)
    assert torch.equal(best.score_BK, exact.topk(3).values)


def test_a_score_is_the_same_number_in_any_company() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(5, 129), torch.randn(5, 31, 129)
    for cosine in (False, True):
        together = exact_scores(query, key, cosine)
        alone = [
            [float(exact_scores(query[b : b + 1], key[b : b + 1, m : m + 1], cosine)) for m in range(31)]
            for b in range(5)
        ]
        assert together.tolist() == alone


def test_equal_scores_are_ordered_by_entry() -> None:
    table = KeyTable(torch.ones(20, 4), torch.arange(20), torch.zeros(20, dtype=torch.int64))
    assert table.top(torch.ones(1, 4), 5).entry_BK.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ties_of_cosines_are_ordered_by_entry_whatever_the_querys_length(monkeypatch, scale) -> None:
    """All cosines are the same negative number: which candidates a product happens to propose must not matter."""
    monkeypatch.setattr(search, "_SPARE", 0)
    key = -torch.ones(50, 4) * torch.arange(1, 51)[:, None]
    table = KeyTable(key.flip(0), torch.arange(50), torch.zeros(50, dtype=torch.int64))
    best = table.top(torch.ones(1, 4) * scale, 3, cosine=True)
    exact = exact_scores(torch.ones(1, 4) * scale, key.flip(0)[None], True)[0]
    expected = sorted(range(50), key=lambda n: (-float(exact[n]), n))[:3]
    assert best.entry_BK[0].tolist() == expected


def test_fewer_entries_than_wanted_are_filled_up_with_none() -> None:
    best = merge([RetrievedEntries(torch.tensor([[4, 2]]), torch.tensor([[1.0, 1.0]], dtype=torch.float64))], 3)
    assert best.entry_BK.tolist() == [[2, 4, -1]]
    assert best.score_BK.tolist() == [[1.0, 1.0, -torch.inf]]
