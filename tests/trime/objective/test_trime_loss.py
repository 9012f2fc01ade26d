"""The loss in chunks equals equation 2 written down plainly in float64, gradients included, for all three memories."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pema_ray.trime.model.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Bands, full_log_probs, full_score
from pema_ray.trime.model.memory_lm import VocabularyScore
from pema_ray.trime.objective import softmax
from pema_ray.trime.objective.loss import joint_log_prob
from pema_ray.trime.objective.memories import PADDING, Places, external_memory, local_memory, long_memory
from pema_ray.trime.objective.softmax import MemoryScore, log_normaliser

VOCABULARY = 6


class Batch:
    """B segments of L random positions, the last of them perhaps shorter."""

    def __init__(self, segments: int, length: int, hidden: int, padding: int, seed: int, scale: float = 1.0) -> None:
        torch.manual_seed(seed)
        self.state_BLH, self.key_BLH = (
            (torch.randn(segments, length, hidden, dtype=torch.float64) * scale).requires_grad_() for _ in range(2)
        )
        self.weight_VH = torch.randn(VOCABULARY, hidden, dtype=torch.float64, requires_grad=True)
        self.label_BL = torch.randint(0, VOCABULARY, (segments, length))
        if padding:
            self.label_BL[-1, -padding:] = PADDING
        self.counts_BL = self.label_BL != PADDING
        segment_BL = torch.arange(segments)[:, None].expand(segments, length)
        self.places = Places(
            segment_BL, torch.randint(0, 2, (segments, length)).flatten().sort().values.view_as(segment_BL)
        )

    @property
    def inputs(self) -> list[Tensor]:
        return [self.state_BLH, self.key_BLH, self.weight_VH]

    def vocabulary(self) -> VocabularyScore:
        return full_score(self.state_BLH[self.counts_BL], self.weight_VH, self.label_BL[self.counts_BL])

    def memory(self, kind: str) -> MemoryScore:
        match kind:
            case "local":
                score = local_memory(self.key_BLH, self.label_BL)
                return MemoryScore(score.log_positive[self.counts_BL], score.log_normaliser[self.counts_BL])
            case "long" | "long in documents":
                return long_memory(self.key_BLH, self.label_BL, self.places, kind == "long", gather=False)
            case _:
                return external_memory(self.key_BLH, self.label_BL, self.places, kind == "ext hidden", gather=False)

    def sees(self, kind: str, i: int, j: int) -> bool:
        """Whether position i looks at the memory of position j; positions counted through the batch."""
        segment, document = self.places.segment_BL.flatten().tolist(), self.places.document_BL.flatten().tolist()
        same = segment[i] == segment[j]
        return {
            "local": same and j < i,
            "long": j < i,
            "long in documents": j < i and document[i] == document[j],
            "ext": not same or j < i,
            "ext hidden": not same,
        }[kind]

    def plain(self, kind: str) -> Tensor:
        """-log P of every position by equation 2, the sums written out."""
        label = self.label_BL.flatten().tolist()
        state, key = self.state_BLH.flatten(0, 1), self.key_BLH.flatten(0, 1)
        nll = []
        for i, target in enumerate(label):
            if target == PADDING:
                continue
            masses = list((self.weight_VH @ state[i]).exp())
            for j, token in enumerate(label):
                if token != PADDING and self.sees(kind, i, j):
                    masses[token] = masses[token] + (key[i] @ key[j] / math.sqrt(key.shape[1])).exp()
            nll.append(-torch.log(masses[target] / torch.stack(masses).sum()))
        return torch.stack(nll)


KINDS = ("local", "long", "long in documents", "ext", "ext hidden")


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 99), st.integers(1, 60)
)
def test_loss_and_gradients_are_those_of_equation_2(
    kind: str, segments: int, length: int, hidden: int, padding: int, seed: int, chunk: int
):
    batch = Batch(segments, length, hidden, min(padding, length - 1), seed)
    with pytest.MonkeyPatch.context() as patch:
        for function in ("memory_score", "log_normaliser"):
            defaults = getattr(softmax, function).__defaults__
            patch.setattr(getattr(softmax, function), "__defaults__", (*defaults[:-1], chunk))
        loss_N = -joint_log_prob(batch.vocabulary(), batch.memory(kind))
        weight_N = torch.rand(len(loss_N), dtype=torch.float64)
        ours = torch.autograd.grad((loss_N * weight_N).sum(), batch.inputs, materialize_grads=True)
    plain_N = batch.plain(kind)
    theirs = torch.autograd.grad((plain_N * weight_N).sum(), batch.inputs, materialize_grads=True)
    torch.testing.assert_close(loss_N, plain_N, atol=1e-10, rtol=1e-10)
    for name, actual, expected in zip(("state", "key", "weight"), ours, theirs, strict=True):
        torch.testing.assert_close(
            actual, expected, atol=1e-9, rtol=1e-8, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_large_inner_products_neither_overflow_nor_vanish(kind: str):
    """In float32, with logits of some thousands."""
    batch = Batch(3, 4, 8, 0, seed=1, scale=60.0)
    exact_N = -joint_log_prob(batch.vocabulary(), batch.memory(kind))
    batch.state_BLH, batch.key_BLH = (t.detach().float().requires_grad_() for t in (batch.state_BLH, batch.key_BLH))
    batch.weight_VH = batch.weight_VH.detach().float().requires_grad_()
    loss_N = -joint_log_prob(batch.vocabulary(), batch.memory(kind))
    torch.testing.assert_close(loss_N.double(), exact_N, atol=5e-3, rtol=1e-4)
    for gradient in torch.autograd.grad(loss_N.sum(), batch.inputs, materialize_grads=True):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("tie", [True, False])
@given(st.integers(0, 99), st.integers(1, 40))
def test_adaptive_softmax_is_a_distribution_and_its_score_is_found_without_it(tie: bool, seed: int, rows: int):
    torch.manual_seed(seed)
    embedding = AdaptiveEmbedding(Bands.of(12, (4, 9), 2, 8), 8).double()
    adaptive = AdaptiveSoftmax(embedding, tie, 0.0).double()
    state_NH, target_N = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 12, (rows,))
    log_prob_NV, normaliser_N = adaptive.log_probs(state_NH)
    torch.testing.assert_close(log_prob_NV.exp().sum(1), torch.ones(rows, dtype=torch.float64))
    score = adaptive.score(state_NH, target_N)
    torch.testing.assert_close(score.log_normaliser_N, normaliser_N)
    torch.testing.assert_close(score.log_prob_N, log_prob_NV[range(rows), target_N])
    inputs = [state_NH, *embedding.weights, *adaptive.parameters()]
    ours = torch.autograd.grad(score.log_prob_N.sum(), inputs, materialize_grads=True)
    theirs = torch.autograd.grad(log_prob_NV[range(rows), target_N].sum(), inputs, materialize_grads=True)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_with_an_adaptive_softmax_the_memory_shares_the_head_clusters_normaliser():
    """The published choice: n_v is log Σ over the head alone, whatever the target's cluster."""
    torch.manual_seed(0)
    adaptive = AdaptiveSoftmax(AdaptiveEmbedding(Bands.of(12, (4, 9), 2, 8), 8), True, 0.0)
    state_NH, target_N = torch.randn(5, 8), torch.tensor([1, 5, 10, 3, 11])
    head_logits = state_NH @ adaptive._head_KH.T
    assert head_logits.shape == (5, 4 + 2)
    memory = MemoryScore(torch.randn(5), torch.randn(5) + 2)
    found_N = joint_log_prob(adaptive.score(state_NH, target_N), memory)
    mass_N = head_logits.exp().sum(1)
    log_prob_N = adaptive.log_probs(state_NH)[0][range(5), target_N]
    expected_N = (log_prob_N.exp() * mass_N + memory.log_positive.exp()) / (mass_N + memory.log_normaliser.exp())
    torch.testing.assert_close(found_N.exp(), expected_N)


def test_without_a_positive_the_memory_only_takes_mass_away():
    vocabulary = VocabularyScore(torch.tensor([-1.0]), torch.tensor([2.0]))
    memory = MemoryScore(torch.tensor([-math.inf]), torch.tensor([2.0]))
    assert float(joint_log_prob(vocabulary, memory)) == pytest.approx(-1.0 - math.log(2))


def test_an_empty_memory_is_the_language_model_alone():
    vocabulary = VocabularyScore(torch.tensor([-1.5]), torch.tensor([2.0]))
    empty = MemoryScore(torch.tensor([-math.inf]), torch.tensor([-math.inf]))
    assert float(joint_log_prob(vocabulary, empty)) == float(joint_log_prob(vocabulary, None)) == -1.5


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200), st.integers(0, 99))
def test_the_vocabularys_normaliser_in_chunks(rows: int, words: int, chunk: int, seed: int):
    torch.manual_seed(seed)
    state_NH, weight_VH = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (rows, words))
    ours_N, plain_N = log_normaliser(state_NH, weight_VH, chunk), full_log_probs(state_NH, weight_VH)[1]
    torch.testing.assert_close(ours_N, plain_N)
    share_N = torch.rand(rows, dtype=torch.float64)
    gradients = [torch.autograd.grad((n * share_N).sum(), (state_NH, weight_VH)) for n in (ours_N, plain_N)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_no_tensor_as_large_as_a_whole_logits_matrix_is_ever_made():
    """512 queries against 512 memories and 4,096 words, at most 8,192 logits at a time."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
            return result

    torch.manual_seed(0)
    key_BLH, label_BL = torch.randn(4, 128, 4, requires_grad=True), torch.randint(0, 4096, (4, 128))
    weight_VH = torch.randn(4096, 4, requires_grad=True)
    index = torch.arange(4)[:, None].expand(4, 128)
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        for function in ("memory_score", "log_normaliser"):
            defaults = getattr(softmax, function).__defaults__
            patch.setattr(getattr(softmax, function), "__defaults__", (*defaults[:-1], 8192))
        score = full_score(key_BLH.flatten(0, 1), weight_VH, label_BL.flatten())
        memory = external_memory(key_BLH, label_BL, Places(index, index), hide_local=False, gather=False)
        joint_log_prob(score, memory).sum().backward()
    assert key_BLH.grad is not None
    assert largest.numbers <= 4 * 4096  # the embeddings themselves
