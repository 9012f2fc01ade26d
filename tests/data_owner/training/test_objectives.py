"""The losses of paper section 3.3: cross-entropy over the whole head, weighed against reconstruction by κ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.objectives import JointObjective, head_cross_entropy

N, H, R, V = 50, 16, 5, 40
HEADS = [
    {"bias": False},
    {"bias": True},
    {"bias": True, "scale": 0.25},
    {"bias": False, "softcap": 5.0},
    {"bias": True, "scale": 2.0, "softcap": 3.0},
]


def batch(count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, H, generator=draw), torch.randint(0, V, (count,), generator=draw)


def objective(make_head, kappa: float, dropout: float = 0.0, **changes) -> JointObjective:
    torch.manual_seed(2)
    adapter = PemaAdapter(AdapterConfig(H, R, "tiny", "a" * 16, dropout=dropout, **changes))
    adapter.start_from_reconstruction(torch.randn(R, H) * 0.3, torch.randn(H, R) * 0.3)
    return JointObjective(adapter, make_head(), kappa)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_head_cross_entropy_is_cross_entropy_of_the_logits_in_value_and_gradient(make_head, options: dict):
    head, (x, y) = make_head(**options), batch()
    x_of_loss, x_of_reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = head_cross_entropy(head, x_of_loss, y)
    expected = F.cross_entropy(head.logits(x_of_reference), y, reduction="none")
    weight = torch.rand(len(y))
    (loss @ weight).backward()
    (expected @ weight).backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_of_loss.grad, x_of_reference.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", HEADS[1::3], ids=str)
def test_chunks_of_rows_do_not_show(make_head, options: dict):
    head, (x, y) = make_head(**options), batch(2500)
    x_of_loss, x_of_reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    head_cross_entropy(head, x_of_loss, y).mean().backward()
    F.cross_entropy(head.logits(x_of_reference), y).backward()
    torch.testing.assert_close(x_of_loss.grad, x_of_reference.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_bfloat16_head_gives_a_float32_loss(make_head, softcap: float | None):
    head, (x, y) = make_head(softcap=softcap), batch()
    exact = head_cross_entropy(head, x, y).mean()
    loss = head_cross_entropy(make_head(softcap=softcap).bfloat16(), x, y).mean()
    assert loss.dtype == torch.float32
    assert abs(float(loss - exact)) < 2**-6 * float(exact)  # eight bits of mantissa, twice rounded


@pytest.mark.parametrize("space", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 0.2, 1.0])
def test_the_loss_is_kappa_times_reconstruction_and_the_rest_prediction(
    make_head, kappa: float, residual: bool, space: str
):
    joint, (f, y) = objective(make_head, kappa, space=space, residual=residual).eval(), batch()
    adapter, head = joint.adapter, joint.head
    x = adapter.enter(f, head)
    rct = F.mse_loss(x @ adapter.A.T @ adapter.B_rct.T, x)
    pd = F.nll_loss(adapter.log_probs(f, head), y)
    loss, reconstruction, prediction = joint(f, y)
    torch.testing.assert_close(reconstruction, rct.detach())
    torch.testing.assert_close(prediction, pd.detach())
    torch.testing.assert_close(loss, kappa * rct + (1 - kappa) * pd)


def test_gradients_reach_a_and_b_pd_and_nothing_else(make_head):
    joint, (f, y) = objective(make_head, 0.2).train(), batch()
    joint(f, y)[0].backward()
    assert joint.adapter.A.grad.abs().sum() > 0 and joint.adapter.B_pd.grad.abs().sum() > 0
    assert joint.adapter.B_rct.grad is None
    assert not any(buffer.requires_grad for buffer in joint.head.buffers())


def test_kappa_0_is_prediction_alone(make_head):
    joint, (f, y) = objective(make_head, 0.0).train(), batch()
    loss, reconstruction, prediction = joint(f, y)
    torch.testing.assert_close(loss.detach(), prediction)
    assert float(reconstruction) == 0.0
    torch.testing.assert_close(joint.eval()(f, y)[0].detach(), prediction)


def test_dropout_is_on_in_training_off_in_evaluation_and_on_again_afterwards(make_head):
    joint, (f, y) = objective(make_head, 0.2, dropout=0.3), batch()
    bare = objective(make_head, 0.2)(f, y)[0].detach()

    def draws() -> set[float]:
        return {float(joint(f, y)[0].detach()) for _ in range(4)}

    joint.train()
    assert len(draws()) == 4
    joint.eval()
    assert draws() == {float(bare)}
    joint.train()
    assert len(draws()) == 4


@pytest.mark.parametrize("kappa", [0.0, 0.2])
def test_a_rows_share_counts_as_its_repetition_would(make_head, kappa: float):
    weighted, repeated = objective(make_head, kappa), objective(make_head, kappa)
    (x, y), times = batch(12), torch.tensor([1, 3, 1, 2, 1, 1, 5, 1, 1, 1, 2, 1])
    weighted_losses = weighted(x, y, times / times.sum())
    repeated_losses = repeated(x.repeat_interleave(times, 0), y.repeat_interleave(times))
    for loss, expected in zip(weighted_losses, repeated_losses, strict=True):
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    weighted_losses[0].backward()
    repeated_losses[0].backward()
    for name, parameter in weighted.adapter.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, repeated.adapter.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
