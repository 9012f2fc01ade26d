"""Training starts as the PLM, learns, keeps its best, and resumes bit for bit after it is killed."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.trainer import AdapterHistory, AdapterTrainer
from pema_ray.errors import UserError
from pema_ray.training.checkpoint import load_checkpoint
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import BEST
from tests.training_kit import die, train

H, R = 16, 6
SETTINGS = {
    "rank": R, "batch_size": 64, "epochs": 3, "validate_every": 5, "learning_rate": 1e-2, "dropout": 0.1,
    "reconstruction_batch_size": 128, "reconstruction_epochs": 20,
}  # fmt: skip


@pytest.fixture
def make_trainer(make_head, make_rows, tmp_path: Path):
    """Makes a trainer of 640 rows (10 steps an epoch) in a folder of its own."""

    def make(folder: str = "run", rows: int = 640, space: str = "post_norm", **changes) -> AdapterTrainer:
        config = TrainConfig(**{**SETTINGS, **changes})
        adapter = AdapterConfig(
            H, config.rank, "tiny", "a" * 16, space=space, residual=config.residual, dropout=config.dropout,
            scale=1 / config.rank if config.scale_by_rank else 1.0,
        )  # fmt: skip
        return AdapterTrainer(
            adapter, config, make_head(), make_rows(rows, 1), make_rows(300, 2), tmp_path / folder, seed=7
        )

    return make


def parameters(adapter: PemaAdapter) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}


def assert_same(result: tuple[PemaAdapter, AdapterHistory], expected: tuple[PemaAdapter, AdapterHistory]) -> None:
    """Bit for bit the same adapter, and the same losses at the same steps."""
    for (name, a), b in zip(parameters(result[0]).items(), parameters(expected[0]).values(), strict=True):
        assert torch.equal(a, b), name
    measured = {"seconds": 0.0, "reconstruction_seconds": 0.0, "peak_bytes": 0}  # of the run, not of its result
    assert replace(result[1], **measured) == replace(expected[1], **measured)


# ── learning ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", ["closed_form", "adam", "none"])
def test_the_loss_falls(make_trainer, solver: str):
    history = make_trainer(solver=solver, epochs=6).run()
    first, last = history.validation[0], history.validation[-1]
    assert len(history.train) == history.total_steps == 60
    assert last["prediction"] < 0.75 * first["prediction"]
    assert history.train[-1]["loss"] < 0.75 * history.train[0]["loss"]
    assert (history.reconstruction_error is None) == (solver == "none")


@pytest.mark.parametrize("space", ["pre_norm", "post_norm"])
def test_pema_of_full_rank_starts_as_the_plm(make_trainer, space: str):
    trainer = make_trainer(rank=H, space=space)
    history = trainer.run()
    key, target = torch.from_numpy(trainer.dev.key[:]), torch.from_numpy(trainer.dev.target).long()
    plm = F.nll_loss(trainer.head.log_probs(trainer.head.norm(key)), target)
    assert history.validation[0]["step"] == 0
    assert abs(history.validation[0]["prediction"] - float(plm)) < 1e-4
    assert history.reconstruction_error < 1e-10


def test_a_residual_adapter_of_any_rank_starts_as_the_plm(make_trainer):
    trainer = make_trainer(rank=2, residual=True)
    history = trainer.run()
    key, target = torch.from_numpy(trainer.dev.key[:]), torch.from_numpy(trainer.dev.target).long()
    plm = F.nll_loss(trainer.head.log_probs(trainer.head.norm(key)), target)
    assert abs(history.validation[0]["prediction"] - float(plm)) < 1e-4


def test_adam_approaches_the_closed_form_from_above(make_trainer):
    """Stage 1 alone: both report the error on the dev rows."""
    exact = make_trainer("exact", epochs=1, dropout=0.0).run().reconstruction_error
    few_epochs = make_trainer("few", epochs=1, dropout=0.0, solver="adam", reconstruction_epochs=2).run()
    many_epochs = make_trainer("many", epochs=1, dropout=0.0, solver="adam", reconstruction_epochs=60).run()
    assert exact <= many_epochs.reconstruction_error * 1.05
    assert many_epochs.reconstruction_error < 0.7 * few_epochs.reconstruction_error


@pytest.mark.parametrize("solver", ["closed_form", "adam"])
def test_a_scale_changes_how_maps_are_written_and_not_what_they_reconstruct(make_trainer, solver: str):
    settings = {"epochs": 1, "dropout": 0.0, "solver": solver, "reconstruction_epochs": 60}
    plain = train(make_trainer("plain", **settings))
    scaled = train(make_trainer("scaled", scale_by_rank=True, **settings))
    tolerance = 1e-4 if solver == "closed_form" else 1.0  # Adam's steps differ in size, so it has not converged as far
    assert scaled[1].reconstruction_error == pytest.approx(plain[1].reconstruction_error, rel=tolerance)
    assert scaled[0].config.scale == 1 / R
    x = torch.from_numpy(make_trainer().dev.key[:])
    reconstructed = scaled[0].project(x) @ scaled[0].B_rct.T  # A has moved on in stage 3, but not far
    assert (reconstructed - x).square().mean() < 1.5 * scaled[1].reconstruction_error


def test_the_published_recipe_starts_stage_3_from_new_maps(make_trainer):
    published = {"solver": "adam", "scale_by_rank": True, "fresh_maps": True, "residual": False, "epochs": 1}
    torch.manual_seed(7)
    drawn = PemaAdapter(make_trainer(**published).adapter_config)
    trainer = make_trainer(learning_rate=1e-12, **published)  # so that nothing moves in stage 3
    adapter, history = train(trainer)
    torch.testing.assert_close(adapter.A, drawn.A)
    assert float(adapter.B_pd.abs().max()) < 1e-6
    trainer = make_trainer("taken over", learning_rate=1e-12, **{**published, "fresh_maps": False})
    continued, its_history = train(trainer)
    assert history.reconstruction_error == its_history.reconstruction_error
    assert torch.equal(adapter.B_rct, continued.B_rct)  # stage 1's, in both
    torch.testing.assert_close(continued.B_pd, continued.B_rct)


def test_validations_are_no_part_of_the_time_of_training(make_trainer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for name, seconds in (("learn", 1.0), ("_validate", 1000.0), ("_dev_reconstruction_error", 1000.0)):
        plain = getattr(AdapterTrainer, name)

        def taking(*arguments, plain=plain, seconds=seconds):
            now[0] += seconds
            return plain(*arguments)

        monkeypatch.setattr(AdapterTrainer, name, taking)
    for solver in ("closed_form", "adam"):
        history = make_trainer(solver, epochs=1, solver=solver).run()
        assert history.seconds == 10 and history.reconstruction_seconds == 0


def test_peak_memory_is_that_of_the_whole_training_when_it_was_resumed(make_trainer, monkeypatch):
    first = make_trainer(epochs=1).run()
    monkeypatch.setattr("pema_ray.training.trainer.peak_memory", lambda device: 1)
    assert 1 < make_trainer(epochs=1).run().peak_bytes <= first.peak_bytes


def test_adam_stops_by_the_dev_error_and_keeps_its_best(make_trainer, monkeypatch):
    errors: list[float] = []
    plain = AdapterTrainer._dev_reconstruction_error
    monkeypatch.setattr(AdapterTrainer, "_dev_reconstruction_error", lambda *a: errors.append(plain(*a)) or errors[-1])
    settings = {"solver": "adam", "dropout": 0.0, "epochs": 1, "validate_every": 5, "learning_rate": 0.5}
    history = make_trainer(reconstruction_epochs=200, patience=2, **settings).run()
    *during, reported = errors
    assert during[-1] >= min(during[:-2]) <= during[-2] and len(during) < 200  # the last two were no better
    assert reported == history.reconstruction_error == min(during)


def test_the_best_validation_is_what_is_returned_and_its_figures_are_true(make_trainer):
    trainer = make_trainer(rows=64, epochs=150, patience=100, rank=H, dropout=0.0)  # so few rows that it overfits
    adapter, history = train(trainer)
    best = min(history.validation, key=lambda point: point["prediction"])
    assert (history.best_step, history.best_loss) == (best["step"], best["prediction"])
    assert best["step"] != history.validation[-1]["step"]
    key, target = torch.from_numpy(trainer.dev.key[:]), torch.from_numpy(trainer.dev.target).long()
    loss = F.nll_loss(adapter.log_probs(key, trainer.head), target)
    assert abs(loss.item() - best["prediction"]) < 1e-5
    assert not adapter.training


def test_training_stops_after_patience_validations_without_a_better_one(make_trainer):
    trainer = make_trainer(learning_rate=2.0, patience=2, epochs=40)
    history = trainer.run()
    assert history.stopped_early
    later = [point for point in history.validation if point["step"] > history.best_step]
    assert len(later) == 2 and history.train[-1]["step"] == later[-1]["step"] < history.total_steps
    assert min(point["prediction"] for point in later) >= history.best_loss


def test_validation_sees_so_many_rows_and_no_dropout(make_trainer):
    trainer = make_trainer(validation_rows=100, dropout=0.5, epochs=1)
    adapter, history = train(trainer)
    key, target = torch.from_numpy(trainer.dev.key[:100]), torch.from_numpy(trainer.dev.target[:100]).long()
    loss = F.nll_loss(adapter.log_probs(key, trainer.head), target)
    assert abs(loss.item() - history.best_loss) < 1e-5


def test_one_seed_gives_one_adapter(make_trainer):
    for solver in ("closed_form", "none"):
        expected = train(make_trainer(f"{solver}-1", solver=solver, epochs=1))
        torch.rand(3)  # other random draws in between
        assert_same(expected, train(make_trainer(f"{solver}-2", solver=solver, epochs=1)))


def test_a_loss_that_is_not_finite_ends_the_run_by_name(make_trainer):
    trainer = make_trainer(solver="none")
    trainer.train.key.data[::2] = np.inf
    with pytest.raises(UserError, match="at step 1: lower train.learning_rate"):
        trainer.run()


# ── rows, steps, rates ──────────────────────────────────────────────────────


class Recorded:
    """Rows that record which of them were requested."""

    def __init__(self, rows):
        self.key, self.target, self.weight, self.requested = self, rows.target, None, []
        self._key = rows.key

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            self.requested.append(index)
        return self._key[index]

    def take(self, index):
        if isinstance(index, np.ndarray):
            self.requested.append(index)
        return self._key.take(index)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(make_trainer):
    trainer = make_trainer(epochs=2)
    trainer.train = Recorded(trainer.train)
    trainer.run()
    first_epoch, second_epoch = trainer.train.requested[:10], trainer.train.requested[10:]
    for epoch in (first_epoch, second_epoch):
        assert sorted(np.concatenate(epoch)) == list(range(640))
    assert {tuple(batch) for batch in first_epoch}.isdisjoint({tuple(batch) for batch in second_epoch})
    assert first_epoch[0].tolist() != list(range(64))


def test_the_remainder_of_an_epoch_is_less_than_a_batch_and_changes_every_epoch(make_trainer):
    trainer = make_trainer(rows=650, epochs=3)
    trainer.train = Recorded(trainer.train)
    trainer.run()
    assert trainer.steps == 30
    epochs = [set(np.concatenate(trainer.train.requested[10 * e : 10 * e + 10])) for e in range(3)]
    remainders = [set(range(650)) - epoch for epoch in epochs]
    assert [len(rows) for rows in remainders] == [10, 10, 10] and len(set.union(*remainders)) > 10


def test_fewer_rows_than_a_batch_are_one_batch(make_trainer):
    trainer = make_trainer(rows=20, epochs=3)
    history = trainer.run()
    assert (trainer.sampler.batch_size, history.total_steps, len(history.train)) == (20, 3, 3)


def test_a_batch_that_cannot_be_shared_out_is_refused(make_trainer):
    trainer = make_trainer(batch_size=1)
    trainer.place = Place(0, 2)
    with pytest.raises(UserError, match="train.workers=2: 640 rows in batches of 1 give a worker nothing to do"):
        trainer.run()


def rates_used(trainer: AdapterTrainer) -> list[float]:
    used: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    try:
        trainer.run()
    finally:
        hook.remove()
    return used


def test_the_learning_rate_is_constant_or_falls_as_half_a_cosine(make_trainer):
    assert rates_used(make_trainer("constant")) == [1e-2] * 30
    trainer = make_trainer("cosine", final_learning_rate=1e-3)
    rates = rates_used(trainer)
    expected = [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)]
    assert rates == pytest.approx(expected)
    assert trainer.learning_rate(15) == pytest.approx(5.5e-3) and trainer.learning_rate(30) == pytest.approx(1e-3)


def test_the_leader_reports_every_point_as_it_happens(make_trainer):
    trainer, points = make_trainer(epochs=1), []
    trainer.on_point = lambda kind, point: points.append((kind, point))
    history = trainer.run()
    assert [point for kind, point in points if kind == "train"] == history.train
    assert [point for kind, point in points if kind == "validation"] == history.validation
    assert [point["step"] for point in history.validation] == [0, 5, 10]
    assert AdapterHistory.from_dict(history.to_dict()) == history


# ── resume ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "step"),
    [("train", 3), ("train", 6), ("train", 17), ("validation", 15), ("train", 30), ("validation", 30)],
    ids=lambda value: str(value),
)
def test_a_run_that_was_killed_and_started_again_equals_an_undisturbed_one(make_trainer, kind: str, step: int):
    undisturbed = train(make_trainer("undisturbed", final_learning_rate=1e-3))
    die(make_trainer("dying", final_learning_rate=1e-3), step, kind)
    assert_same(train(make_trainer("dying", final_learning_rate=1e-3)), undisturbed)


def test_a_run_killed_twice_repeats_only_the_steps_after_its_checkpoint(make_trainer):
    undisturbed, steps = train(make_trainer("undisturbed")), []
    for death in (8, 23):
        die(make_trainer("dying"), death)
    resumed = make_trainer("dying")
    resumed.on_point = lambda kind, point: steps.append(point["step"]) if kind == "train" else None
    assert_same(train(resumed), undisturbed)
    assert steps == list(range(21, 31))


def test_a_finished_run_is_not_trained_again(make_trainer):
    expected, steps = train(make_trainer()), []
    repeated = make_trainer()
    repeated.on_point = lambda kind, point: steps.append(point["step"])
    assert_same(train(repeated), expected)
    assert steps == []


# ── parts of a batch, norms, warm-up, windows ──────────────────────────────


def assert_close(adapter: PemaAdapter, expected: PemaAdapter, atol: float = 1e-5) -> None:
    for a, b in zip(adapter.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(make_trainer):
    undivided, history = train(make_trainer("whole", dropout=0.0))
    divided, divided_history = train(
        make_trainer("parts", dropout=0.0, accumulate=5)
    )  # 64 rows are no multiple of five
    assert_close(undivided, divided)
    assert [p["loss"] for p in divided_history.train] == pytest.approx([p["loss"] for p in history.train], rel=1e-5)


def test_a_gradient_is_clipped_to_its_largest_norm(make_trainer, monkeypatch):
    norms: list[tuple[float, float]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, max_norm):
        norm = clip(parameters, max_norm)
        norms.append((float(norm), float(torch.stack([p.grad.norm() for p in parameters]).norm())))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    make_trainer(epochs=1, clip=0.05).run()
    assert len(norms) == 10 and any(before > 0.05 for before, _ in norms)
    assert all(after <= 0.05 + 1e-6 for _, after in norms)


def test_the_learning_rate_warms_up_in_a_straight_line(make_trainer):
    rates = rates_used(make_trainer("constant", warm_up_steps=4))
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3] + [1e-2] * 27)
    rates = rates_used(make_trainer("cosine", warm_up_steps=10, final_learning_rate=1e-3))
    expected = [1e-3 + 9e-3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates == pytest.approx([1e-3 * step for step in range(1, 11)] + expected)


class Sharded:
    """Rows cut into shards."""

    def __init__(self, rows, size: int) -> None:
        self._parts = [rows.take(slice(at, at + size)) for at in range(0, len(rows), size)]

    @property
    def mean_weight(self) -> float:
        return 1.0

    @property
    def counts(self) -> list[int]:
        return [len(part) for part in self._parts]

    def read(self, shards):
        return type(self._parts[0]).concatenate([self._parts[shard] for shard in shards])


def windowed(trainer: AdapterTrainer) -> AdapterTrainer:
    trainer.train = Sharded(trainer.train, 128)
    return trainer


def test_windows_of_shards_train_as_well_as_a_global_shuffle(make_trainer):
    exact = make_trainer("global", epochs=6).run()
    window = windowed(make_trainer("window", epochs=6, shuffle="window", window_shards=2)).run()
    assert window.reconstruction_error == pytest.approx(exact.reconstruction_error, rel=1e-5)
    assert window.best_loss == pytest.approx(exact.best_loss, rel=0.03)
    assert len(window.train) == window.total_steps == 6 * 10


def test_a_windowed_run_resumes_too(make_trainer):
    settings = {"shuffle": "window", "window_shards": 2}
    undisturbed = train(windowed(make_trainer("undisturbed", **settings)))
    die(windowed(make_trainer("dying", **settings)), 13)
    assert_same(train(windowed(make_trainer("dying", **settings))), undisturbed)


def test_adam_for_stage_1_needs_all_rows_at_hand(make_trainer):
    with pytest.raises(UserError, match="train.solver=adam needs train.shuffle=global"):
        windowed(make_trainer(shuffle="window", solver="adam")).run()


# ── several processes ───────────────────────────────────────────────────────


def _train_in_a_process(rank: int, world: int, parts: tuple, meeting: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        history = AdapterTrainer(*parts, place=Place(rank, world)).run()
        if rank == 0:
            torch.save(history.to_dict(), f"{meeting}.history")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def run_in_processes(trainer: AdapterTrainer, world: int, meeting: Path) -> tuple[PemaAdapter, AdapterHistory]:
    t = trainer
    parts = (t.adapter_config, t.settings, t.head, t.train, t.dev, t.run_dir, t.seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_a_process, (world, parts, str(meeting), port), nprocs=world)
    adapter = PemaAdapter(t.adapter_config)
    adapter.load_state_dict(load_checkpoint(t.run_dir / BEST)[0]["model"])
    return adapter, AdapterHistory.from_dict(torch.load(f"{meeting}.history"))


def assert_one_curve(history: AdapterHistory, expected: AdapterHistory) -> None:
    for kind in ("train", "validation"):
        points, expected_points = getattr(history, kind), getattr(expected, kind)
        assert [p["step"] for p in points] == [p["step"] for p in expected_points]
        for name in ("loss", "prediction", "reconstruction"):
            values = [p[name] for p in points]
            assert values == pytest.approx([p[name] for p in expected_points], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, {}),
        (4, {"accumulate": 2, "clip": 0.1}),
        (2, {"strategy": "accelerate", "accumulate": 2, "clip": 0.1}),
    ],
    ids=str,
)
def test_processes_train_as_one_would(make_trainer, tmp_path: Path, world: int, settings: dict):
    common = {"dropout": 0.0, "epochs": 2, "warm_up_steps": 3} | {k: v for k, v in settings.items() if k == "clip"}
    single, history = train(make_trainer("one", **common))
    many, many_history = run_in_processes(make_trainer("many", **common | settings), world, tmp_path / "meeting")
    assert_one_curve(history, many_history)
    assert_close(single, many, 1e-4)


def test_the_closed_form_of_many_processes_is_that_of_one(make_trainer, tmp_path: Path):

    settings = {"rows": 20_000, "batch_size": 20_000, "epochs": 1, "learning_rate": 1e-12, "validate_every": 100}
    single, single_history = train(make_trainer("one", **settings))
    many, many_history = run_in_processes(make_trainer("many", **settings), 3, tmp_path / "meeting")
    torch.testing.assert_close(single.B_rct @ single.A, many.B_rct @ many.A, atol=1e-5, rtol=1e-5)
    assert many_history.reconstruction_error == pytest.approx(single_history.reconstruction_error, rel=1e-5)


def test_two_processes_resume_from_the_checkpoint_of_one(make_trainer, tmp_path: Path):
    settings = {"dropout": 0.0, "epochs": 2}
    single, history = train(make_trainer("one", **settings))
    die(make_trainer("dying", **settings), 8)
    resumed, resumed_history = run_in_processes(make_trainer("dying", **settings), 2, tmp_path / "meeting")
    assert_one_curve(history, resumed_history)
    assert_close(single, resumed, 1e-4)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deepspeed_trains_as_one_process_would_and_resumes(make_trainer, tmp_path: Path, stage: int):
    common = {"dropout": 0.0, "epochs": 2, "clip": 0.1}
    single, history = train(make_trainer("one", **common))
    die(make_trainer("many", **common), 8)
    settings = common | {"strategy": "deepspeed", "zero_stage": stage, "accumulate": 2}
    many, many_history = run_in_processes(make_trainer("many", **settings), 2, tmp_path / "meeting")
    assert_one_curve(history, many_history)
    assert_close(single, many, 1e-4)
    resumed, _ = train(make_trainer("many", **common))  # any strategy can load the checkpoint
    assert_close(resumed, many, 0.0)


def test_a_checkpoint_of_another_shape_is_named(make_trainer):
    die(make_trainer("dying"), 7)
    refused = r"checkpoint.safetensors: holds a model of another shape.*train.resume=false"
    with pytest.raises(UserError, match=refused):
        make_trainer("dying", rank=4).run()


def test_a_checkpoints_description_does_not_grow_with_the_run(make_trainer):
    sizes = []
    for epochs in (1, 4):
        trainer = make_trainer(f"{epochs} epochs", epochs=epochs)
        trainer.run()
        sizes.append(int.from_bytes((trainer.run_dir / "checkpoint.safetensors").read_bytes()[:8], "little"))
        assert (trainer.run_dir / "points.jsonl").read_bytes().count(b'"train"') == 10 * epochs
    assert abs(sizes[1] - sizes[0]) < 64
