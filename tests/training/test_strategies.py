"""Any module and any optimiser train alike alone, by DDP, accelerate and DeepSpeed, and take up each other's state."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.training.checkpoint import load_checkpoint, save_checkpoint
from pema_ray.training.strategies import Place, Strategy, make_strategy

ROWS, STEPS, BREAK = 24, 6, 3
ALONE = Place()


class Contrast(nn.Module):
    """Contrastive loss of rows and their partners against the whole batch, over all processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.query = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8))
        self.key = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x_NH: Tensor, y_NH: Tensor, first: int) -> tuple[Tensor, Tensor]:
        query, key = self.query(x_NH * self.frozen), self.key(y_NH)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            from torch.distributed.nn.functional import all_gather

            key = torch.cat(all_gather(key))
        score = self.scale * query @ key.T
        partner = first + torch.arange(len(x_NH))
        return F.cross_entropy(score, partner), (score.argmax(1) == partner).float().mean()


Named = Sequence[tuple[str, nn.Parameter]]


def groups(named: Named) -> list[dict]:
    """With weight decay, and (norms, biases) without."""
    return [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


def nesterov(named: Named) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.01)


def adamw(named: Named) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(named), lr=1.0)


class Counting(torch.optim.Optimizer):
    """Counts steps as Python numbers, by parameter and by group, and divides its updates by them."""

    def __init__(self, named: Named) -> None:
        super().__init__(groups(named), {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["seen"] = state.get("seen", 0.5) + 1
                p.sub_(p.grad, alpha=group["lr"] / (state["seen"] * group["step"]))


def lamb(named: Named) -> torch.optim.Optimizer:
    return pytest.importorskip("pytorch_optimizer").Lamb(groups(named), lr=1.0)


OPTIMIZERS: dict[str, Callable] = {"nesterov": nesterov, "adamw": adamw, "counting": Counting, "lamb": lamb}
RATES = {"nesterov": 0.05, "adamw": 1e-2, "counting": 0.1, "lamb": 1e-2}


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, int]:
    """This process's rows of a step, and where they begin."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 8, generator=draw)
    y = x.roll(1, 1) + 0.3 * torch.randn(ROWS, 8, generator=draw)
    each = ROWS // world
    own_rows = slice(rank * each, (rank + 1) * each)
    return x[own_rows], y[own_rows], rank * each


def strategy_of(kind: str, place: Place, module: nn.Module, optimizer: str, zero_stage: int = 1) -> Strategy:
    return make_strategy(
        kind,  # type: ignore[arg-type]
        place,
        module,
        OPTIMIZERS[optimizer],
        batch_size=ROWS,
        clip=0.5,
        zero_stage=zero_stage,
        idle_inputs=partial(batch, 0, place.rank, place.world),
        unused_parameters=True,
    )


def train(
    kind: str, optimizer: str, checkpoint: Path, first: int, last: int, place: Place = ALONE, zero_stage: int = 1
) -> list[float]:
    """Steps `first` … `last` from the checkpoint, if there is one, and a new one; the losses of this process."""
    module = Contrast()
    state: dict[str, Tensor] = {}
    if checkpoint.exists():
        saved, described = load_checkpoint(checkpoint)
        module.load_state_dict(saved["model"])
        assert described == {"step": first}
        state = saved["optimizer"]
    strategy = strategy_of(kind, place, module, optimizer, zero_stage)
    strategy.load_optimizer_state(state)
    losses = []
    for step in range(first, last):
        loss, right = strategy.learn(batch(step, place.rank, place.world), last=True)
        assert not loss.requires_grad and 0 <= right <= 1
        strategy.step(RATES[optimizer], 0.5)
        losses.append(float(loss))
    state = strategy.optimizer_state()
    if place.leads:
        save_checkpoint(checkpoint, {"model": module.state_dict(), "optimizer": state}, {"step": last})
    return losses


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_checkpoint(checkpoint)[0]["model"]


# ── one process ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(optimizer: str, tmp_path: Path):
    whole = train("ddp", optimizer, tmp_path / "whole", 0, STEPS)
    parts = train("ddp", optimizer, tmp_path / "parts", 0, BREAK)
    parts += train("ddp", optimizer, tmp_path / "parts", BREAK, STEPS)
    assert parts == whole
    assert not torch.equal(weights(tmp_path / "whole")["key.weight"], Contrast().key.weight)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    one, two = (load_checkpoint(tmp_path / name)[0]["optimizer"] for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_state_has_every_entry_of_every_updated_parameter(tmp_path: Path):
    expected = {
        "adamw": {"step", "exp_avg", "exp_avg_sq"},
        "nesterov": {"momentum_buffer"},
        "counting": {"seen:number"},
    }
    updated = {name for name, p in Contrast().named_parameters() if p.requires_grad and not name.startswith("unused")}
    for optimizer, entries in expected.items():
        train("ddp", optimizer, tmp_path / optimizer, 0, 1)
        state = load_checkpoint(tmp_path / optimizer)[0]["optimizer"]
        by_group = {"group:0.step:number", "group:1.step:number"} if optimizer == "counting" else set()
        assert set(state) == {f"{name}.{entry}" for name in updated for entry in entries} | by_group


def test_groups_keep_their_weight_decay_when_a_state_is_loaded(tmp_path: Path):
    optimizers: list[torch.optim.Optimizer] = []

    def recorded_adamw(named: Named) -> torch.optim.Optimizer:
        optimizers.append(adamw(named))
        return optimizers[-1]

    train("ddp", "adamw", tmp_path / "one", 0, 1)
    strategy = make_strategy("ddp", Place(), Contrast(), recorded_adamw)
    strategy.load_optimizer_state(load_checkpoint(tmp_path / "one")[0]["optimizer"])
    assert [group["weight_decay"] for group in optimizers[0].param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizers[0].param_groups] == [1.0, 1.0]


def test_the_state_of_another_model_is_refused():
    strategy = make_strategy("ddp", Place(), nn.Linear(2, 2), nesterov)
    with pytest.raises(UserError, match=r"optimiser state 'other.exp_avg' is of another model.*train.resume=false"):
        strategy.load_optimizer_state({"other.exp_avg": torch.zeros(2)})


def test_a_module_may_return_its_loss_alone():
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.w * x).square().sum()

    module = Square()
    strategy = make_strategy("ddp", Place(), module, lambda named: torch.optim.SGD([p for _, p in named], lr=1.0))
    for last in (False, True):  # two parts of a batch: gradients add up
        (loss,) = strategy.learn((torch.tensor([1.0]),), last)
        assert float(loss) == 4.0
    strategy.step(0.1, None)
    assert float(module.w.detach()) == pytest.approx(2.0 - 0.1 * (4.0 + 4.0))


# ── several processes ───────────────────────────────────────────────────────


def _in_a_process(rank: int, world: int, meeting: str, port: int, parts: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        kind, optimizer, checkpoint, first, last, zero_stage = parts
        train(kind, optimizer, checkpoint, first, last, Place(rank, world), zero_stage)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def train_together(kind: str, optimizer: str, checkpoint: Path, first: int, last: int, zero_stage: int = 1) -> None:
    """`train` in two processes, each with half of the rows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = checkpoint.with_name(f"{checkpoint.name}-{kind}-{first}-meeting")
    parts = (kind, optimizer, checkpoint, first, last, zero_stage)
    torch.multiprocessing.spawn(_in_a_process, (2, str(meeting), port, parts), nprocs=2)


@pytest.mark.parametrize(
    ("kind", "optimizer", "zero_stage"),
    [
        ("ddp", "nesterov", 1),
        ("accelerate", "adamw", 1),
        pytest.param("deepspeed", "nesterov", 1, marks=pytest.mark.slow),
        pytest.param("deepspeed", "adamw", 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_and_one_take_up_each_others_state(kind: str, optimizer: str, zero_stage: int, tmp_path: Path):
    """One begins, two go on, one ends; the loss needs the rows of both, and their gradients."""
    train("ddp", optimizer, tmp_path / "alone", 0, 3 * BREAK)
    train("ddp", optimizer, tmp_path / "mixed", 0, BREAK)
    train_together(kind, optimizer, tmp_path / "mixed", BREAK, 2 * BREAK, zero_stage)
    train("ddp", optimizer, tmp_path / "mixed", 2 * BREAK, 3 * BREAK)
    for group in ("model", "optimizer"):
        alone, mixed = (load_checkpoint(tmp_path / name)[0][group] for name in ("alone", "mixed"))
        for name, tensor in alone.items():
            if kind == "deepspeed" and name.startswith("unused"):
                continue  # decays: a gradient that is missing is zero there
            torch.testing.assert_close(tensor, mixed[name], atol=1e-5, rtol=1e-4, msg=f"{group}: {name}")


def test_accelerate_that_counts_other_processes_is_refused():
    with pytest.raises(UserError, match="train.strategy=accelerate: 3 workers, but accelerate counts 1"):
        make_strategy("accelerate", Place(0, 3), nn.Linear(2, 2), nesterov)
