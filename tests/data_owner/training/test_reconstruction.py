"""The closed form of stage 1 is the best rank-R map, and its reported error is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.training.objectives import ReconstructionObjective
from pema_ray.data_owner.training.reconstruction import SecondMoment, reconstruction_error, solve

N, H = 300, 12


def rows(seed: int = 0, count: int = N) -> torch.Tensor:
    """Anisotropic rows that are not centred, as context representations are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=draw) * torch.linspace(3, 0.2, H) @ torch.randn(H, H, generator=draw) + 1


def moment_of(x: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(H)
    moment.add(x)
    return moment


@given(seed=st.integers(0, 1000), rank=st.integers(1, H))
def test_it_is_the_truncated_svd_and_knows_its_error(seed: int, rank: int):
    x = rows(seed)
    A, B, error = solve(moment_of(x), rank)
    U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    optimum = float((best - x).square().mean())
    scale = float(x.square().mean())
    assert A.shape == (rank, H) and B.shape == (H, rank)
    assert abs(error - optimum) < 1e-6 * scale
    assert abs(error - reconstruction_error(A, B, [x])) < 1e-5 * scale
    torch.testing.assert_close(A @ A.T, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close((x @ A.T @ B.T).double(), best, atol=1e-3, rtol=1e-3)


def test_full_rank_reconstructs_every_row():
    x = rows()
    A, B, error = solve(moment_of(x), H)
    assert error == 0
    assert reconstruction_error(A, B, [x]) < 1e-10 * float(x.square().mean())


def test_adam_comes_as_near_to_the_optimum_as_its_epochs_allow():
    """The gap to the smallest possible error: the sum of the float64 eigenvalues beyond rank R."""
    x, rank = rows(), 4
    omitted = torch.linalg.eigvalsh(x.double().T @ x.double())[:-rank]
    optimum = float(omitted.sum()) / x.numel()
    assert solve(moment_of(x), rank)[2] == pytest.approx(optimum, rel=1e-5)
    torch.manual_seed(0)
    objective = ReconstructionObjective(torch.randn(rank, H) * 0.2, torch.zeros(H, rank), dropout=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    gaps = []
    for epoch in range(1, 401):
        for batch in x.split(30):
            optimizer.zero_grad()
            objective(batch).backward()
            optimizer.step()
        if epoch in (10, 100, 400):
            error = reconstruction_error(objective.A.detach(), objective.B.detach(), [x])
            assert float(objective(x).detach()) == pytest.approx(error, rel=1e-5)
            gaps.append(error / optimum - 1)
    assert gaps[0] > 0.02 and 1e-3 > gaps[1] > gaps[2] > -1e-5, gaps


def test_the_moments_of_two_parts_add_up_to_that_of_the_whole():
    x = rows()
    parts = moment_of(x[:70])
    parts += moment_of(x[70:])
    total = moment_of(x)
    assert parts.rows == total.rows == N
    torch.testing.assert_close(parts.M, total.M, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(total.M, x.double().T @ x.double(), rtol=1e-5, atol=1e-2)
    assert solve(parts, 3)[2] == pytest.approx(solve(total, 3)[2], rel=1e-5)


def test_half_precision_rows_are_summed_in_float32_or_better():
    x = rows().half()
    assert torch.equal(moment_of(x).M, moment_of(x.float()).M)


def test_the_error_of_batches_is_that_of_their_rows_together():
    x = rows()
    A, B, _ = solve(moment_of(x), 3)
    assert reconstruction_error(A, B, x.split(37)) == pytest.approx(reconstruction_error(A, B, [x]), rel=1e-6)
    assert reconstruction_error(A, B, []) == 0.0


def test_no_dropout_in_evaluation_and_some_in_training():
    x = rows()
    objective = ReconstructionObjective(torch.randn(3, H), torch.randn(H, 3), dropout=0.5)
    expected = (x @ objective.A.T @ objective.B.T - x).square().mean()
    torch.testing.assert_close(objective.eval()(x), expected)
    assert not torch.allclose(objective.train()(x), expected)


def test_a_rows_weight_counts_as_its_repetition_would():
    x, times = torch.randn(30, 8, generator=torch.Generator().manual_seed(4)), torch.arange(30) % 4 + 1
    weighted, repeated = SecondMoment(8), SecondMoment(8)
    weighted.add(x, times)
    repeated.add(x.repeat_interleave(times, 0))
    assert weighted.rows == repeated.rows == int(times.sum())
    torch.testing.assert_close(weighted.M, repeated.M, atol=1e-4, rtol=1e-5)
