"""The training loop: what it reports, when it validates, saves and stops, and that it resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pema_ray.training.config import TrainingConfig
from pema_ray.training.history import TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import BEST, StepInputs, Trainer
from tests.training_kit import die

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Distance(nn.Module):
    """Squared distance of the weights, after dropout, to the target; each of two parts has half the weight."""

    def __init__(self, model: nn.Linear) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(0.2)

    def forward(self, factor: float) -> tuple[Tensor, Tensor]:
        loss = (self.dropout(self.model.weight[0]) - TARGET).square().sum() * factor
        return loss, loss.detach() * 2


@dataclass
class Learner(Trainer[TrainingConfig, TrainerHistory]):
    """Ten steps of two parts; the dev loss is the real distance, or comes from `dev_losses`."""

    run_dir: Path
    factors: dict[int, float] = field(default_factory=dict)
    dev_losses: list[float] = field(default_factory=list)
    patience: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    steps = 10
    batch_size = 2
    validate_every = 3
    checkpoint_every = 4
    on_point: Any = lambda kind, point: None
    on_saved: Any = lambda metrics: None

    def __post_init__(self) -> None:
        self.settings, self.place, self.seed = TrainingConfig(accumulate=2), Place(), 5
        self.model, self.history, self.closed = nn.Linear(3, 1, bias=False), TrainerHistory(), False
        self.objective = Distance(self.model)

    def prepare(self) -> None:
        nn.init.zeros_(self.model.weight)

    def make_optimizer(self, named: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter for _, parameter in named])

    def idle_inputs(self) -> tuple[float]:
        return (0.0,)

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        try:
            for step in range(first, self.steps):
                yield StepInputs([(self.factors.get(step, 0.5),)] * 2, count=2)
        finally:
            self.closed = True

    def learning_rate(self, step: int) -> float:
        return 0.5 / (step + 1)

    def point(self, sums: Tensor, count: float) -> dict[str, float]:
        loss, double = (sums / count).tolist()
        assert double == 2 * loss or math.isnan(loss)
        return {"loss": loss}

    def validation(self) -> dict[str, float]:
        assert not self.objective.training
        if self.dev_losses:
            return {"loss": self.dev_losses[len(self.history.validation)]}
        return {"loss": float(self.objective(1.0)[0])}


def weights(learner: Learner) -> Tensor:
    return learner.model.weight.detach().clone()


def test_it_validates_and_saves_when_it_says_and_ends_with_its_best(tmp_path: Path) -> None:
    points: list[tuple[str, int]] = []
    saved: list[int] = []
    learner = Learner(tmp_path, dev_losses=[9, 5, 7, 3, 4], on_saved=lambda metrics: saved.append(metrics["step"]))
    learner.on_point = lambda kind, point: points.append((kind, point["step"]))
    history = learner.run()
    assert [step for kind, step in points if kind == "train"] == list(range(1, 11))
    assert [step for kind, step in points if kind == "validation"] == [0, 3, 6, 9, 10]
    assert saved == [4, 8, 10]
    assert (history.best_step, history.best_loss, history.stale) == (9, 3, 1)
    assert [point["learning_rate"] for point in history.train] == [0.5 / step for step in range(1, 11)]
    last = load_checkpoint(tmp_path / CHECKPOINT)[0]["model"]["weight"]
    assert torch.equal(weights(learner), load_checkpoint(tmp_path / BEST)[0]["model"]["weight"])
    assert not torch.equal(weights(learner), last)


@pytest.mark.parametrize(("step", "kind"), [(1, "train"), (4, "train"), (5, "train"), (9, "validation"), (10, "train")])
def test_a_run_that_died_goes_on_bit_for_bit(tmp_path: Path, step: int, kind: str) -> None:
    undisturbed = Learner(tmp_path / "undisturbed")
    expected = undisturbed.run()
    die(Learner(tmp_path / "died"), step, kind)
    torch.manual_seed(99)  # whatever the new process's random state is
    resumed = Learner(tmp_path / "died")
    history = resumed.run()
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert (history.train, history.validation) == (expected.train, expected.validation)
    assert (history.best_step, history.best_loss) == (expected.best_step, expected.best_loss)


def test_only_the_leading_process_keeps_training_points(tmp_path: Path) -> None:
    die(Learner(tmp_path), 5)
    follower = Learner(tmp_path)
    follower.place = Place(rank=1)
    history = follower.run()
    assert not history.train and follower.steps_taken == 10
    assert [point["step"] for point in history.validation] == [0, 3, 6, 9, 10]


def test_it_stops_when_patience_is_over_and_closes_its_batches(tmp_path: Path) -> None:
    learner = Learner(tmp_path, dev_losses=[4, 3, 3, 3.5], patience=2)
    history = learner.run()
    assert history.stopped_early and len(history.train) == 9 and history.best_step == 3
    assert learner.closed and load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 9


def test_too_few_batches_are_an_error(tmp_path: Path) -> None:
    learner = Learner(tmp_path)
    batches = learner.batches
    learner.batches = lambda first: (inputs for _, inputs in zip(range(4), batches(first)))  # type: ignore[assignment]
    with pytest.raises(UserError, match="there are batches for 4 of 10 steps only"):
        learner.run()


def test_a_history_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = {"train": [], "validation": [], "best_step": 3, "best_prediction": 1.5, "tokens": 7, "seconds": 2.0}
    assert TrainerHistory.from_dict(old) == TrainerHistory(best_step=3, best_loss=1.5, seconds=2.0)


def test_a_loss_that_is_no_number_moves_nothing(tmp_path: Path) -> None:
    learner = Learner(tmp_path, factors={4: math.nan})
    with pytest.raises(UserError, match=r"infinite or no number at step 5: lower train\.learning_rate"):
        learner.run()
    assert torch.equal(weights(learner), load_checkpoint(tmp_path / CHECKPOINT)[0]["model"]["weight"])  # of step 4
    assert learner.closed


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path) -> None:
    die(Learner(tmp_path), 5)
    learner = Learner(tmp_path)
    learner.model = nn.Linear(4, 1, bias=False)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: holds a model of another shape.*resume=false"):
        learner.run()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    for groups in ({"adapter": {"A": TARGET}}, {"model": {"weight": TARGET[None]}}):
        save_checkpoint(tmp_path / CHECKPOINT, groups, {"step": 3, "history": {}})
        with pytest.raises(UserError, match=r"another version of this project\. Start over with train\.resume=false"):
            Learner(tmp_path).run()


def test_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    first = Learner(tmp_path)
    first.run()
    kinds: list[str] = []
    again = Learner(tmp_path, on_point=lambda kind, point: kinds.append(kind))
    again.run()
    assert not kinds and torch.equal(weights(again), weights(first))
