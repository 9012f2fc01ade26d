"""λ predicted from the state: fitted to held-out rows, where it is never worse than the best constant."""

from __future__ import annotations

import math

import pytest
import torch

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.adapter.predicted_lambda import fit_gate
from pema_ray.errors import UserError

H, N = 16, 2000


def rows(informative: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """If informative, the adapter is right where the state's first number is positive, and the PLM elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    x = 50 * torch.randn(N, H, generator=draw)
    right = x[:, 0] > 0 if informative else torch.rand(N, generator=draw) > 0.3
    good, bad = torch.tensor(0.8).log(), torch.tensor(0.02).log()
    return x, torch.where(right, good, bad), torch.where(right, bad, good)


def test_an_informative_state_is_used():
    gate = torch.nn.Linear(H, 1)
    constant, predicted = fit_gate(gate, [tuple(part[a:b] for part in rows(True)) for a, b in ((0, 700), (700, N))])
    assert constant == pytest.approx(-math.log(0.41), abs=0.01)  # half and half
    assert predicted < 0.35  # 0.22 would be a perfect gate
    x, pema, plm = rows(True, seed=1)
    lam = torch.sigmoid(gate(x))[:, 0]
    assert (lam[pema > plm] > 0.5).float().mean() > 0.95


def test_an_uninformative_state_gives_a_constant():
    gate = torch.nn.Linear(H, 1)
    constant, predicted = fit_gate(gate, [rows(False)])
    assert constant - 0.01 < predicted <= constant
    lam = torch.sigmoid(gate(rows(False, seed=1)[0]))
    assert abs(float(lam.mean()) - 0.7) < 0.08


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match="the dev memory has 20 rows"):
        fit_gate(torch.nn.Linear(H, 1), [tuple(part[:20] for part in rows(True))])


@torch.no_grad()
def test_the_adapters_distribution_is_the_mixture(make_head):
    head = make_head()
    adapter = PemaAdapter(AdapterConfig(H, 4, "tiny", "a" * 16, residual=True, predicts_lambda=True)).eval()
    adapter.B_pd.normal_()
    state = torch.randn(5, H)
    assert adapter.gate is not None
    alone = adapter.log_probs(state, head)  # before it is fitted, λ is one
    adapter.gate.weight.normal_()
    adapter.gate.bias.zero_()
    lam = torch.sigmoid(adapter.gate(adapter.enter(state, head)))
    expected = lam * alone.exp() + (1 - lam) * head.log_probs(head.norm(state)).exp()
    torch.testing.assert_close(adapter.log_probs(state, head).exp(), expected, atol=1e-6, rtol=1e-4)
