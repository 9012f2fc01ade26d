"""A predictor is an adapter, the nearest rows of a memory, or both; its spec names their folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.config import KnnMixConfig
from pema_ray.data_owner.decoding import Predictor, PredictorSpec
from pema_ray.errors import UserError
from tests.data_owner.training.test_ray_training import write_memory

pytest.importorskip("faiss")


@pytest.fixture
def adapter(card) -> PemaAdapter:
    """An adapter of one state that predicts λ."""
    torch.manual_seed(1)
    adapter = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint, predicts_lambda=True))
    assert adapter.gate is not None
    for parameter in (adapter.B_pd, adapter.gate.weight):
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(adapter.gate.bias)
    return adapter.eval()


@torch.inference_mode()
def test_decoding_and_likelihood_have_the_same_mixture(make_head, make_rows, adapter):
    """`log(s P_own + (1 - s) P_LM)` step by step is `log_probs` of the same rows."""
    head, state = make_head(), torch.from_numpy(make_rows(20, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    plain = head.log_probs(head.norm(state)).exp()
    for predictor in (
        Predictor(head, adapter),
        Predictor(head, None, neighbours),
        Predictor(head, adapter, neighbours, 0.3),
    ):
        log_p_own, share = predictor.distribution(state, [None] * len(state))
        torch.testing.assert_close(log_p_own.exp().sum(-1), torch.ones(20))
        expected = share[:, None] * log_p_own.exp() + (1 - share[:, None]) * plain
        torch.testing.assert_close(predictor.log_probs(state).exp(), expected, atol=1e-6, rtol=1e-4)


@torch.inference_mode()
def test_neighbours_beside_an_adapter_have_their_weight(make_head, make_rows, adapter):
    head, state = make_head(), torch.from_numpy(make_rows(20, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    mixed = Predictor(head, adapter, neighbours, 0.3).log_probs(state).exp()
    expected = 0.7 * adapter.log_probs(state, head).exp() + 0.3 * neighbours.log_probs(state, head).exp()
    torch.testing.assert_close(mixed, expected)
    assert Predictor(head, None, neighbours, 0.3).weight == 1.0  # without an adapter
    assert Predictor(head, adapter, None, 0.3).weight == 0.0


def test_only_an_adapter_that_looks_back_needs_the_prompt(make_head, make_rows, card, adapter):
    head = make_head()
    config = AdapterConfig(16, 4, card.name, card.fingerprint, local_memory_width=8, prompt_from=3)
    looking = Predictor(head, PemaAdapter(config))
    assert (looking.looks_back, looking.prompt_from) == (True, 3)
    assert not Predictor(head, adapter).looks_back
    assert not Predictor(head, None, NearestNeighbours(make_rows(50, 1), head, 4)).looks_back


def test_a_spec_loads_its_folders(make_head, make_rows, card, tmp_path):
    head = make_head()
    adapter = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint)).save_pretrained(tmp_path / "adapter")
    memory = write_memory(tmp_path / "memory", card, make_rows(300, 1), "train")
    knn = KnnMixConfig(weight=0.25, neighbours=8, temperature=2.0)

    def parts(spec: PredictorSpec) -> tuple[bool, int, float]:
        loaded = spec.load(card, head)
        return loaded.adapter is not None, 0 if loaded.neighbours is None else len(loaded.neighbours), loaded.weight

    assert parts(PredictorSpec(adapter)) == (True, 0, 0.0)
    assert parts(PredictorSpec(None, memory, knn)) == (False, 300, 1.0)
    spec = PredictorSpec(adapter, memory, knn)
    assert parts(spec) == (True, 300, 0.25)
    assert parts(PredictorSpec(adapter, memory)) == (True, 0, 0.0)  # of weight 0
    assert parts(PredictorSpec(None, memory, knn, max_examples=20)) == (False, 20, 1.0)
    neighbours = spec.load(card, head).neighbours
    assert neighbours is not None and (neighbours.neighbours, neighbours.temperature) == (8, 2.0)
    assert {spec: 1}[PredictorSpec(adapter, memory, knn)] == 1  # actors cache predictors by spec
    spec.check(card)


def test_an_empty_spec_or_a_missing_folder_is_refused(make_head, card, tmp_path):
    adapter = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter, a memory, or both"):
        PredictorSpec()
    missing = tmp_path / "nothing"
    for spec in (PredictorSpec(adapter, missing, KnnMixConfig(weight=0.25)), PredictorSpec(missing)):
        for refuse in (spec.check, lambda card, spec=spec: spec.load(card, make_head())):
            with pytest.raises(UserError, match="nothing: "):
                refuse(card)


def test_a_gate_of_zero_leaves_the_neighbours_alone(make_head, make_rows, adapter):
    """If g is zero, s is w, and P_own is P_kNN."""
    head, state = make_head(), torch.from_numpy(make_rows(5, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    with torch.inference_mode():
        adapter.gate.weight.zero_()
        adapter.gate.bias.fill_(-200.0)
        log_p_own, share = Predictor(head, adapter, neighbours, 0.3).distribution(state, [None] * 5)
        np.testing.assert_allclose(share, 0.3, rtol=1e-5)
        torch.testing.assert_close(log_p_own.exp(), neighbours.log_probs(state, head).exp(), atol=1e-6, rtol=1e-4)
