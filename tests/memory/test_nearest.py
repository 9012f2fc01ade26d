"""Searching the parts of a datastore equals one search over all of it; mismatched queries are refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.memory.search.nearest import OnePieceSearch, SearchResult, merge, recall
from tests.trime.kit import keys_of, part_of


def by_hand(query_NH, key_MH, token_M, k: int, metric: str):
    """All similarities sorted, the lower row first among equals."""
    query, key = query_NH.astype(np.float64), key_MH.numpy().astype(np.float64)
    similarity = query @ key.T if metric == "inner_product" else -np.square(query[:, None] - key[None]).sum(-1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.asarray(token_M)[order], order


@given(
    rows=st.integers(1, 60),
    k=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59), max_size=6),
    actors=st.integers(1, 5),
    metric=st.sampled_from(["inner_product", "l2"]),
    seed=st.integers(0, 99),
)
def test_any_sharding_finds_what_one_piece_finds(rows, k, cuts, actors, metric, seed):
    """Integer keys: half of all similarities are ties, and still every sharding gives the same rows."""
    k = min(k, rows)
    key_MH, token_M = keys_of(rows, 3, seed, integers=True)
    query_NH = keys_of(4, 3, seed + 1000, integers=True)[0].numpy()
    borders = [0, *sorted(cut for cut in cuts if cut < rows), rows]
    parts = [part_of(key_MH[a:b], token_M[a:b], a, metric=metric) for a, b in pairwise(borders)]
    together = OnePieceSearch(parts).search(query_NH, k)
    shards = [parts[number::actors] for number in range(actors) if parts[number::actors]]
    merged = merge([merge([part.search(query_NH, k) for part in shard], k) for shard in shards], k)
    similarity, token, row = by_hand(query_NH, key_MH, token_M, k, metric)
    for result in (together, merged):
        assert np.array_equal(result.similarity_NK.numpy(), similarity.astype(np.float32))
        assert np.array_equal(result.row_NK.numpy(), row)
        assert np.array_equal(result.token_NK.numpy(), token)


def test_real_numbers_come_out_bit_for_bit_alike():
    key_MH, token_M = keys_of(500, 24, 3)
    query_NH = keys_of(40, 24, 4)[0].numpy()
    parts = [part_of(key_MH[a : a + 100], token_M[a : a + 100], a) for a in range(0, 500, 100)]
    together = OnePieceSearch(parts).search(query_NH, 32)
    merged = merge([OnePieceSearch(parts[:1]).search(query_NH, 32), OnePieceSearch(parts[1:]).search(query_NH, 32)], 32)
    assert torch.equal(together.similarity_NK, merged.similarity_NK)
    assert torch.equal(together.row_NK, merged.row_NK)


def test_more_neighbours_than_entries_are_refused():
    search = OnePieceSearch([part_of(*keys_of(30)), part_of(*keys_of(12), first_row=30)])
    query_NH = keys_of(2)[0].numpy()
    assert search.search(query_NH, 42).row_NK.min() == 0
    with pytest.raises(UserError, match="43 neighbours requested of a datastore of 42 entries. Lower 'neighbours'"):
        search.search(query_NH, 43)


def test_queries_of_another_width_are_refused():
    with pytest.raises(UserError, match="Queries of 8 numbers for a datastore whose keys have 16"):
        part_of(*keys_of(30)).search(np.zeros((2, 8), np.float32), 3)


def test_recall_is_the_share_of_true_neighbours():
    def rows(*numbers):
        row = torch.tensor(numbers)
        return SearchResult(torch.zeros(row.shape), torch.zeros_like(row), row)

    assert recall(rows([1, 2, 3, 4], [5, 6, 7, 8]), rows([1, 2, 3, 9], [8, 7, 6, 5])) == pytest.approx(7 / 8)
