"""Held-out likelihood equals the softmax written out, at every λ, with EOS rows apart from text rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pema_ray.evaluation.likelihood import TokenLikelihood, token_likelihood
from pema_ray.line import LMHead
from pema_ray.line.lm_head import HeadSpec

N, H, V, EOS = 2100, 6, 11, 1


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(N, H)).astype(np.float32), draw.integers(0, V, N).astype(np.int32)


@pytest.fixture(scope="module")
def head() -> LMHead:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*size, generator=draw) for name, size in {"weight": (V, H), "norm_weight": (H,)}.items()
    }
    return LMHead(HeadSpec("rms_norm", 1e-5), tensors)


@dataclass
class Block:
    key: np.ndarray
    target: np.ndarray
    is_target: np.ndarray


def blocks(rows: tuple[np.ndarray, np.ndarray]) -> Iterator[Block]:
    """The rows in three blocks, each with a first row that is not a target."""
    key, target = rows
    for part in np.array_split(np.arange(N), 3):
        first = np.zeros((1, H), np.float32)
        is_target = np.arange(len(part) + 1) > 0
        yield Block(np.concatenate([first, key[part]]), np.concatenate([[EOS], target[part]]), is_target)


def target_states(block: Block) -> torch.Tensor:
    return torch.from_numpy(block.key[block.is_target])


@pytest.fixture(scope="module")
def measured(rows, head) -> TokenLikelihood:
    return token_likelihood(blocks(rows), [EOS], head, lambda block: head.log_probs(-target_states(block)))


def by_hand(rows, head) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the targets under PEMA (here: the head on -f) and the PLM, in float64."""
    key, target = rows
    f, W = key.astype(np.float64), head.weight.double().numpy()
    normed = f / np.sqrt((f**2).mean(-1, keepdims=True) + 1e-5) * head.norm_weight.double().numpy()

    def softmax_of(x: np.ndarray) -> np.ndarray:
        p = np.exp(x @ W.T)
        return (p / p.sum(-1, keepdims=True))[np.arange(N), target]

    return softmax_of(-f), softmax_of(normed)


def test_both_likelihoods_are_the_softmax_at_the_target(rows, head, measured):
    pema, plm = by_hand(rows, head)
    np.testing.assert_allclose(np.exp(measured.log_pema), pema, rtol=1e-4)
    np.testing.assert_allclose(np.exp(measured.log_plm), plm, rtol=1e-4)
    assert np.array_equal(measured.is_eos, rows[1] == EOS)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.7, 1.0])
def test_nll_is_that_of_the_mixture_over_text_or_eos_rows(rows, head, measured, lam: float, eos: bool):
    pema, plm = by_hand(rows, head)
    selected = (rows[1] == EOS) == eos
    expected = -np.log(lam * pema + (1 - lam) * plm)[selected].mean()
    assert measured.nll(lam, eos) == pytest.approx(expected, rel=1e-5)


def test_every_eos_of_the_plm_counts_as_one(rows, head):
    several = token_likelihood(blocks(rows), [EOS, 5], head, lambda block: head.log_probs(target_states(block)))
    assert np.array_equal(several.is_eos, np.isin(rows[1], [1, 5]))


def test_lambda_0_and_1_survive_impossible_tokens():
    scores = TokenLikelihood(np.array([-np.inf, -1.0]), np.array([-2.0, -np.inf]), np.array([False, True]))
    assert scores.nll(0.0) == 2.0 and scores.nll(1.0, eos=True) == 1.0
