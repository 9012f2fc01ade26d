"""A local memory: one softmax, causal, and it learns to copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pema_ray.data_owner.adapter.local_memory import LocalMemory, LocalMemoryCache, log_mixture
from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.objectives import JointObjective
from pema_ray.data_owner.training.trainer import AdapterTrainer
from tests.data_owner.adapter.test_look_back import H, V, copying_trainer, stirred, with_batches_of_40
from tests.data_owner.training.test_training import assert_close, assert_one_curve, run_in_processes
from tests.training_kit import die, train

LENGTHS = (5, 1, 4)


@pytest.fixture
def memory() -> LocalMemory:
    module = stirred(LocalMemory(H, 8))
    assert isinstance(module, LocalMemory)
    with torch.no_grad():
        module.rest.bias.fill_(0.5)  # neither side dominates
    return module


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x [N, H]`, targets (few, so that they recur), sequences, and log P of the maps `[N, V]`."""
    draw = torch.Generator().manual_seed(4)
    n = sum(LENGTHS)
    example = torch.repeat_interleave(torch.tensor([7, 2, 9]), torch.tensor(LENGTHS))
    target = torch.randint(0, 3, (n,), generator=draw)
    return torch.randn(n, H, generator=draw), target, example, torch.randn(n, V, generator=draw).log_softmax(-1)


def naive(memory: LocalMemory, x, target, example, log_pema) -> torch.Tensor:
    """The equation of the module's first lines, row by row, in float64."""
    p_NV = torch.zeros(len(x), V, dtype=torch.float64)
    q, k = (linear(memory.norm(x)).double() for linear in (memory.query, memory.key))
    s_0 = memory.rest(memory.norm(x)).double()[:, 0]
    for t in range(len(x)):
        past = [j for j in range(t) if example[j] == example[t]]
        scores = [s_0[t], *(q[t] @ k[j] / 8**0.5 for j in past)]
        a = torch.stack(scores).softmax(0)
        p_NV[t] = a[0] * log_pema[t].double().exp()
        for share, j in zip(a[1:], past, strict=True):
            p_NV[t, target[j]] += share
    return p_NV


@torch.no_grad()
def test_it_is_the_equation_and_sums_to_one(memory, rows):
    x, target, example, log_pema = rows
    expected = naive(memory, *rows)
    log_p = log_mixture(x, log_pema, memory, target, example, torch.ones(len(x), dtype=torch.bool))
    torch.testing.assert_close(log_p.double().exp(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(x)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_only_selected_rows_are_computed(memory, rows):
    x, target, example, log_pema = rows
    every = log_mixture(x, log_pema, memory, target, example, torch.ones(len(x), dtype=torch.bool))
    selected = torch.arange(len(x)) % 3 == 1  # none of the sequence of one row
    some = log_mixture(x, log_pema[selected], memory, target, example, selected)
    torch.testing.assert_close(some, every[selected])


@pytest.mark.parametrize("prompt_length", [0, 1, 4])
@torch.no_grad()
def test_steps_give_what_one_pass_gives(memory, rows, prompt_length: int):
    """After a prompt of any length, even 0."""
    x, target, _, log_pema = (part[:5] for part in rows)
    expected = log_mixture(x, log_pema, memory, target, torch.zeros(5), torch.ones(5, dtype=torch.bool))
    cache = LocalMemoryCache(memory, x[:prompt_length], target[:prompt_length])
    for t in range(prompt_length, 5):
        cache.step(x[t : t + 1])
        torch.testing.assert_close(cache.mix(log_pema[t : t + 1])[0], expected[t])
        cache.follow(int(target[t]))


@torch.no_grad()
def test_an_adapters_rows_are_those_of_its_loss(make_head, rows):
    x, target, example, _ = rows
    objective, share = make_objective(make_head).eval(), torch.full((len(x),), 1 / len(x))
    log_p = objective.adapter.log_probs(x, objective.head, (target, example, share > 0))
    torch.testing.assert_close(
        -log_p.gather(1, target[:, None])[:, 0], objective.row_losses(x, target, share, example)[2]
    )


def make_objective(make_head, **changes) -> JointObjective:
    config = AdapterConfig(H, 6, "tiny", "a" * 16, residual=True, local_memory_width=8, **changes)
    adapter = stirred(PemaAdapter(config), 2)
    assert isinstance(adapter, PemaAdapter) and adapter.local_memory is not None
    with torch.no_grad():
        adapter.local_memory.rest.bias.fill_(0.5)
    return JointObjective(adapter, make_head(), 0.2)


@pytest.mark.parametrize("changes", [{}, {"look_back_layers": 1, "look_back_width": 8}], ids=str)
def test_the_loss_is_that_of_the_distribution_and_has_its_gradient(make_head, rows, changes: dict):
    x, target, example, _ = rows
    objective = make_objective(make_head, **changes).eval()
    adapter, head = objective.adapter, objective.head
    share = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 1, 1]) / 7
    _, _, loss = objective(x, target, share, example)
    selected = share > 0
    entered = adapter.enter(x, head)
    log_pema = head.log_probs(adapter.leave(adapter.predict(adapter.look(entered, target, example, head)), head))
    p_NV = naive(adapter.local_memory, entered, target, example, log_pema)
    expected = -p_NV[selected].gather(1, target[selected, None])[:, 0].log().float() @ share[selected]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    named = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    loss = objective.row_losses(x, target, share, example)[2] @ share[selected]
    gradients = torch.autograd.grad(loss, list(named.values()))
    expected_gradients = torch.autograd.grad(expected, list(named.values()))
    for name, gradient, expected_gradient in zip(named, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_later_rows_change_nothing(make_head, rows):
    x, target, example, _ = rows
    adapter, head = make_objective(make_head).adapter.eval(), make_head()
    every = torch.ones(len(x), dtype=torch.bool)
    log_p = adapter.log_probs(x, head, (target, example, every))
    changed_x, changed_target = x.clone(), target.clone()
    changed_x[3:] += 1
    changed_target[2:] += 1  # the token after row 2 is what row 2 predicts
    changed_log_p = adapter.log_probs(changed_x, head, (changed_target, example, every))
    torch.testing.assert_close(changed_log_p[:3], log_p[:3])
    assert not torch.allclose(changed_log_p[4], log_p[4])


def make_trainer(head, folder: Path, width: int) -> AdapterTrainer:
    settings = {"local_memory": width, "look_back_dropout": 0.0, "predict_lambda": True}
    return copying_trainer(head, folder, settings, local_memory_width=width, predicts_lambda=True)


def test_it_learns_to_copy_and_when_to_trust_itself(make_head, tmp_path: Path):
    blind = make_trainer(make_head(), tmp_path / "blind", 0).run()
    adapter, seeing = train(make_trainer(make_head(), tmp_path / "seeing", 16))
    assert blind.best_loss > 3.0  # 37 equally likely tokens: 3.6 nats
    assert seeing.best_loss < 0.5 * blind.best_loss
    loaded = PemaAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "adapter"))
    described = (tmp_path / "adapter/README.md").read_text()
    assert "local memory of width 16" in described and "predicts λ" in described
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert seeing.lambda_nll is not None and loaded.gate is not None
    assert seeing.lambda_nll[1] <= seeing.lambda_nll[0]
    assert float(loaded.gate.bias) != 20.0  # it was fitted


def test_a_resumed_training_equals_an_undisturbed_one(make_head, tmp_path: Path):
    undisturbed, _ = train(make_trainer(make_head(), tmp_path / "one", 16))
    die(make_trainer(make_head(), tmp_path / "two", 16), 47)
    resumed, _ = train(make_trainer(make_head(), tmp_path / "two", 16))
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_two_processes_are_one(make_head, tmp_path: Path):
    one, two = (make_trainer(make_head(), tmp_path / folder, 16) for folder in ("one", "two"))
    single, history = train(with_batches_of_40(one, predict_lambda=False))
    many, many_history = run_in_processes(with_batches_of_40(two, predict_lambda=False), 2, tmp_path / "meeting")
    assert_one_curve(history, many_history)
    assert_close(single, many, 1e-4)


def test_it_stays_off_by_default():
    assert not AdapterConfig(H, 4, "tiny", "a" * 16).looks_back
    adapter = PemaAdapter(AdapterConfig(H, 4, "tiny", "a" * 16))
    assert adapter.local_memory is None and adapter.gate is None
