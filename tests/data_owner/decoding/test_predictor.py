"""A predictor is an adapter, the nearest rows of a memory, or both; its spec names what lies on disk."""

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
    """Of one state, with a λ that it predicts."""
    torch.manual_seed(1)
    made = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint, predicts_lambda=True))
    assert made.gate is not None
    for parameter in (made.B_pd, made.gate.weight):
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(made.gate.bias)
    return made.eval()


@torch.inference_mode()
def test_its_share_and_its_own_distribution_make_what_the_likelihood_has(make_head, make_rows, adapter):
    """`log(s P_own + (1 - s) P_LM)` step by step is `log_probs` of the same rows."""
    head, state = make_head(), torch.from_numpy(make_rows(20, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    plain = head.log_probs(head.norm(state)).exp()
    for predictor in (
        Predictor(head, adapter),
        Predictor(head, None, neighbours),
        Predictor(head, adapter, neighbours, 0.3),
    ):
        log_own, share = predictor.distribution(state, [None] * len(state))
        torch.testing.assert_close(log_own.exp().sum(-1), torch.ones(20))
        expected = share[:, None] * log_own.exp() + (1 - share[:, None]) * plain
        torch.testing.assert_close(predictor.log_probs(state).exp(), expected, atol=1e-6, rtol=1e-4)


@torch.inference_mode()
def test_neighbours_beside_an_adapter_have_their_weight(make_head, make_rows, adapter):
    head, state = make_head(), torch.from_numpy(make_rows(20, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    both = Predictor(head, adapter, neighbours, 0.3).log_probs(state).exp()
    expected = 0.7 * adapter.log_probs(state, head).exp() + 0.3 * neighbours.log_probs(state, head).exp()
    torch.testing.assert_close(both, expected)
    assert Predictor(head, None, neighbours, 0.3).weight == 1.0  # alone they count whole
    assert Predictor(head, adapter, None, 0.3).weight == 0.0


def test_only_an_adapter_that_looks_back_needs_the_prompt(make_head, make_rows, card, adapter):
    head = make_head()
    config = AdapterConfig(16, 4, card.name, card.fingerprint, local_memory_width=8, prompt_from=3)
    looking = Predictor(head, PemaAdapter(config))
    assert (looking.looks_back, looking.prompt_from) == (True, 3)
    assert not Predictor(head, adapter).looks_back
    assert not Predictor(head, None, NearestNeighbours(make_rows(50, 1), head, 4)).looks_back


def test_a_spec_names_what_lies_on_disk(make_head, make_rows, card, tmp_path):
    head = make_head()
    adapter = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint)).save_pretrained(tmp_path / "adapter")
    memory = write_memory(tmp_path / "memory", card, make_rows(300, 1), "train")
    knn = KnnMixConfig(weight=0.25, neighbours=8, temperature=2.0)

    def parts(spec: PredictorSpec) -> tuple[bool, int, float]:
        loaded = spec.load(card, head)
        return loaded.adapter is not None, 0 if loaded.neighbours is None else len(loaded.neighbours), loaded.weight

    assert parts(PredictorSpec(adapter)) == (True, 0, 0.0)
    assert parts(PredictorSpec(None, memory, knn)) == (False, 300, 1.0)
    both = PredictorSpec(adapter, memory, knn)
    assert parts(both) == (True, 300, 0.25)
    assert parts(PredictorSpec(adapter, memory)) == (True, 0, 0.0)  # of weight 0
    assert parts(PredictorSpec(None, memory, knn, max_examples=20)) == (False, 20, 1.0)
    neighbours = both.load(card, head).neighbours
    assert neighbours is not None and (neighbours.neighbours, neighbours.temperature) == (8, 2.0)
    assert {both: 1}[PredictorSpec(adapter, memory, knn)] == 1  # actors keep what they have loaded by it
    both.check(card)


def test_a_spec_of_nothing_or_of_what_is_not_there_is_refused(make_head, card, tmp_path):
    adapter = PemaAdapter(AdapterConfig(16, 4, card.name, card.fingerprint)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="an adapter, a memory, or both"):
        PredictorSpec()
    nothing = tmp_path / "nothing"
    for spec in (PredictorSpec(adapter, nothing, KnnMixConfig(weight=0.25)), PredictorSpec(nothing)):
        for refuse in (spec.check, lambda card, spec=spec: spec.load(card, make_head())):
            with pytest.raises(UserError, match="nothing: "):
                refuse(card)


def test_a_gate_that_trusts_nobody_leaves_the_neighbours(make_head, make_rows, adapter):
    """Where g is zero, s is w, and P_own is what the neighbours say."""
    head, state = make_head(), torch.from_numpy(make_rows(5, 2).key[:])
    neighbours = NearestNeighbours(make_rows(500, 1), head, 16, 5.0)
    with torch.inference_mode():
        adapter.gate.weight.zero_()
        adapter.gate.bias.fill_(-200.0)
        log_own, share = Predictor(head, adapter, neighbours, 0.3).distribution(state, [None] * 5)
        np.testing.assert_allclose(share, 0.3, rtol=1e-5)
        torch.testing.assert_close(log_own.exp(), neighbours.log_probs(state, head).exp(), atol=1e-6, rtol=1e-4)
