"""kNN-LM predicts what followed the nearest rows: `flat` exactly, `inverted` nearly so."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.decoding.unrolling import mix
from pema_ray.errors import UserError

faiss = pytest.importorskip("faiss")


def oracle(rows, state: torch.Tensor, head, neighbours: int, temperature: float) -> torch.Tensor:
    """Every distance, by hand, in float64."""
    x, query = head.norm(torch.from_numpy(rows.key[:])).double(), head.norm(state).double()
    distance, place = ((query[:, None] - x[None]) ** 2).sum(-1).topk(neighbours, largest=False)
    weight = torch.ones(len(rows)) if rows.weight is None else torch.from_numpy(rows.weight)
    share = weight[place] * (-distance / temperature).exp()
    p_NV = torch.zeros(len(state), head.vocab_size, dtype=torch.float64)
    for n in range(len(state)):
        for k in range(neighbours):
            p_NV[n, int(rows.target[place[n, k]])] += share[n, k]
    return (p_NV / p_NV.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_exact_search_is_what_the_equations_say(make_head, make_rows, weighted: bool):
    head, rows = make_head(), make_rows(300, 1)
    if weighted:
        rows = replace(rows, weight=np.random.default_rng(2).integers(1, 6, 300, dtype=np.int32))
    state = torch.from_numpy(make_rows(20, 5).key[:])
    log_p = NearestNeighbours(rows, head, 9, 30.0).log_probs(state, head)
    torch.testing.assert_close(log_p.double(), oracle(rows, state, head, 9, 30.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(20))


def test_an_inverted_file_finds_nearly_the_same(make_head, make_rows):
    head, rows = make_head(), make_rows(6000, 1)
    state = torch.from_numpy(make_rows(200, 5).key[:])
    _, exact = NearestNeighbours(rows, head, 10).search(state, head)
    _, near = NearestNeighbours(rows, head, 10, index="inverted", probes=40).search(state, head)
    hits = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), near.tolist())]
    assert np.mean(hits) > 9
    _, one_list = NearestNeighbours(rows, head, 500, index="inverted", probes=1).search(state, head)
    assert (one_list < 0).any()  # a list ran out
    log_p = NearestNeighbours(rows, head, 500, index="inverted", probes=1).log_probs(state, head)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(200))


def test_mixing_with_it_helps_where_the_memory_knows_more(make_head, make_rows):
    head, rows, dev = make_head(), make_rows(4000, 1), make_rows(300, 2)
    state, target = torch.from_numpy(dev.key[:]), torch.from_numpy(dev.target).long()[:, None]
    plm = head.log_probs(head.norm(state))
    knn = NearestNeighbours(rows, head, 64, 5.0).log_probs(state, head)
    mixed = mix(knn, plm, torch.full((300,), 0.7))
    assert -mixed.gather(1, target).mean() < -plm.gather(1, target).mean() - 0.5


def test_too_few_rows_and_a_missing_library_are_refused(make_head, make_rows, monkeypatch):
    with pytest.raises(UserError, match="16 neighbours requested, but the memory has 10 rows"):
        NearestNeighbours(make_rows(10, 1), make_head())
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        NearestNeighbours(make_rows(100, 1), make_head())
