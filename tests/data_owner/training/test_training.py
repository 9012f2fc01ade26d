"""Training starts as the PLM, learns, keeps its best, and goes on after a death as if nothing had happened."""

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


def assert_same(one: tuple[PemaAdapter, AdapterHistory], two: tuple[PemaAdapter, AdapterHistory]) -> None:
    """Bit for bit the same adapter, and the same losses at the same steps."""
    for (name, a), b in zip(parameters(one[0]).items(), parameters(two[0]).values(), strict=True):
        assert torch.equal(a, b), name
    measured = {"seconds": 0.0, "reconstruction_seconds": 0.0, "peak_bytes": 0}  # of the run, not of its result
    assert replace(one[1], **measured) == replace(two[1], **measured)


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
    """Of stage 1 alone: the figure that both write down is the error on the dev rows."""
    exact = make_trainer("exact", epochs=1, dropout=0.0).run().reconstruction_error
    few = make_trainer("few", epochs=1, dropout=0.0, solver="adam", reconstruction_epochs=2).run()
    many = make_trainer("many", epochs=1, dropout=0.0, solver="adam", reconstruction_epochs=60).run()
    assert exact <= many.reconstruction_error * 1.05
    assert many.reconstruction_error < 0.7 * few.reconstruction_error


@pytest.mark.parametrize("solver", ["closed_form", "adam"])
def test_a_scale_changes_how_maps_are_written_and_not_what_they_reconstruct(make_trainer, solver: str):
    settings = {"epochs": 1, "dropout": 0.0, "solver": solver, "reconstruction_epochs": 60}
    plain = train(make_trainer("plain", **settings))
    scaled = train(make_trainer("scaled", scale_by_rank=True, **settings))
    near = 1e-4 if solver == "closed_form" else 1.0  # Adam's steps are of another size: it is not as far
    assert scaled[1].reconstruction_error == pytest.approx(plain[1].reconstruction_error, rel=near)
    assert scaled[0].config.scale == 1 / R
    x = torch.from_numpy(make_trainer().dev.key[:])
    again = scaled[0].project(x) @ scaled[0].B_rct.T  # A has moved on in stage 3, but not far
    assert (again - x).square().mean() < 1.5 * scaled[1].reconstruction_error


def test_the_published_recipe_starts_stage_3_from_new_maps(make_trainer):
    published = {"solver": "adam", "scale_by_rank": True, "fresh_maps": True, "residual": False, "epochs": 1}
    torch.manual_seed(7)
    drawn = PemaAdapter(make_trainer(**published).adapter_config)
    trainer = make_trainer(learning_rate=1e-12, **published)  # so that nothing moves in stage 3
    adapter, history = train(trainer)
    torch.testing.assert_close(adapter.A, drawn.A)
    assert float(adapter.B_pd.abs().max()) < 1e-6
    kept, taken_over = train(make_trainer("taken over", learning_rate=1e-12, **{**published, "fresh_maps": False}))
    assert history.reconstruction_error == taken_over.reconstruction_error
    assert torch.equal(adapter.B_rct, kept.B_rct)  # stage 1's, in both
    torch.testing.assert_close(kept.B_pd, kept.B_rct)


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


def test_adam_stops_when_the_dev_rows_say_so_and_keeps_its_best(make_trainer, monkeypatch):
    errors: list[float] = []
    plain = AdapterTrainer._dev_reconstruction_error
    monkeypatch.setattr(AdapterTrainer, "_dev_reconstruction_error", lambda *a: errors.append(plain(*a)) or errors[-1])
    settings = {"solver": "adam", "dropout": 0.0, "epochs": 1, "validate_every": 5, "learning_rate": 0.5}
    history = make_trainer(reconstruction_epochs=200, patience=2, **settings).run()
    *during, reported = errors
    assert during[-1] >= min(during[:-2]) <= during[-2] and len(during) < 200  # the last two were no better
    assert reported == history.reconstruction_error == min(during)


def test_the_best_validation_is_what_is_returned_and_its_figures_are_true(make_trainer):
    trainer = make_trainer(rows=64, epochs=150, patience=100, rank=H, dropout=0.0)  # so few rows are learned by heart
    adapter, history = train(trainer)
    best = min(history.validation, key=lambda point: point["prediction"])
    assert (history.best_step, history.best_loss) == (best["step"], best["prediction"])
    assert best["step"] != history.validation[-1]["step"]
    key, target = torch.from_numpy(trainer.dev.key[:]), torch.from_numpy(trainer.dev.target).long()
    again = F.nll_loss(adapter.log_probs(key, trainer.head), target)
    assert abs(again.item() - best["prediction"]) < 1e-5
    assert not adapter.training


def test_training_stops_after_patience_validations_without_a_better_one(make_trainer):
    trainer = make_trainer(learning_rate=2.0, patience=2, epochs=40)
    history = trainer.run()
    assert history.stopped_early
    after = [point for point in history.validation if point["step"] > history.best_step]
    assert len(after) == 2 and history.train[-1]["step"] == after[-1]["step"] < history.total_steps
    assert min(point["prediction"] for point in after) >= history.best_loss


def test_validation_sees_so_many_rows_and_no_dropout(make_trainer):
    trainer = make_trainer(validation_rows=100, dropout=0.5, epochs=1)
    adapter, history = train(trainer)
    key, target = torch.from_numpy(trainer.dev.key[:100]), torch.from_numpy(trainer.dev.target[:100]).long()
    again = F.nll_loss(adapter.log_probs(key, trainer.head), target)
    assert abs(again.item() - history.best_loss) < 1e-5


def test_one_seed_gives_one_adapter(make_trainer):
    for solver in ("closed_form", "none"):
        one = train(make_trainer(f"{solver}-1", solver=solver, epochs=1))
        torch.rand(3)  # whatever else draws random numbers in between
        assert_same(one, train(make_trainer(f"{solver}-2", solver=solver, epochs=1)))


def test_a_loss_that_is_not_finite_ends_the_run_by_name(make_trainer):
    trainer = make_trainer(solver="none")
    trainer.train.key.data[::2] = np.inf
    with pytest.raises(UserError, match="at step 1: lower train.learning_rate"):
        trainer.run()


# ── rows, steps, rates ──────────────────────────────────────────────────────


class Recorded:
    """Rows that remember which of them were asked for."""

    def __init__(self, rows):
        self.key, self.target, self.weight, self.asked = self, rows.target, None, []
        self._key = rows.key

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            self.asked.append(index)
        return self._key[index]

    def take(self, index):
        if isinstance(index, np.ndarray):
            self.asked.append(index)
        return self._key.take(index)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(make_trainer):
    trainer = make_trainer(epochs=2)
    trainer.train = Recorded(trainer.train)
    trainer.run()
    first, second = trainer.train.asked[:10], trainer.train.asked[10:]
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(640))
    assert {tuple(batch) for batch in first}.isdisjoint({tuple(batch) for batch in second})
    assert first[0].tolist() != list(range(64))


def test_the_rows_an_epoch_leaves_over_are_fewer_than_a_batch_and_others_every_time(make_trainer):
    trainer = make_trainer(rows=650, epochs=3)
    trainer.train = Recorded(trainer.train)
    trainer.run()
    assert trainer.steps == 30
    seen = [set(np.concatenate(trainer.train.asked[10 * e : 10 * e + 10])) for e in range(3)]
    left = [set(range(650)) - epoch for epoch in seen]
    assert [len(rows) for rows in left] == [10, 10, 10] and len(set.union(*left)) > 10


def test_fewer_rows_than_a_batch_are_one_batch(make_trainer):
    trainer = make_trainer(rows=20, epochs=3)
    history = trainer.run()
    assert (trainer.feed.batch_size, history.total_steps, len(history.train)) == (20, 3, 3)


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
    trainer, seen = make_trainer(epochs=1), []
    trainer.on_point = lambda kind, point: seen.append((kind, point))
    history = trainer.run()
    assert [point for kind, point in seen if kind == "train"] == history.train
    assert [point for kind, point in seen if kind == "validation"] == history.validation
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


def test_a_run_killed_twice_repeats_only_what_came_after_its_checkpoint(make_trainer):
    undisturbed, steps = train(make_trainer("undisturbed")), []
    for death in (8, 23):
        die(make_trainer("dying"), death)
    last = make_trainer("dying")
    last.on_point = lambda kind, point: steps.append(point["step"]) if kind == "train" else None
    assert_same(train(last), undisturbed)
    assert steps == list(range(21, 31))


def test_a_finished_run_is_not_trained_again(make_trainer):
    done, steps = train(make_trainer()), []
    again = make_trainer()
    again.on_point = lambda kind, point: steps.append(point["step"])
    assert_same(train(again), done)
    assert steps == []


# ── parts of a batch, norms, warm-up, windows ──────────────────────────────


def close(one: PemaAdapter, two: PemaAdapter, atol: float = 1e-5) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(make_trainer):
    whole, history = train(make_trainer("whole", dropout=0.0))
    parts, divided = train(make_trainer("parts", dropout=0.0, accumulate=5))  # 64 rows are no multiple of five
    close(whole, parts)
    assert [p["loss"] for p in divided.train] == pytest.approx([p["loss"] for p in history.train], rel=1e-5)


def test_a_gradient_is_clipped_to_its_largest_norm(make_trainer, monkeypatch):
    norms: list[tuple[float, float]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, most):
        before = clip(parameters, most)
        norms.append((float(before), float(torch.stack([p.grad.norm() for p in parameters]).norm())))
        return before

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


def assert_one_curve(one: AdapterHistory, two: AdapterHistory) -> None:
    for kind in ("train", "validation"):
        mine, theirs = getattr(one, kind), getattr(two, kind)
        assert [p["step"] for p in mine] == [p["step"] for p in theirs]
        for name in ("loss", "prediction", "reconstruction"):
            ours = [p[name] for p in mine]
            assert ours == pytest.approx([p[name] for p in theirs], abs=1e-4, rel=1e-4)


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
    alike = {"dropout": 0.0, "epochs": 2, "warm_up_steps": 3} | {k: v for k, v in settings.items() if k == "clip"}
    one, history = train(make_trainer("one", **alike))
    many, shared = run_in_processes(make_trainer("many", **alike | settings), world, tmp_path / "meeting")
    assert_one_curve(history, shared)
    close(one, many, 1e-4)


def test_the_closed_form_of_many_processes_is_that_of_one(make_trainer, tmp_path: Path):
    quiet = {"epochs": 1, "learning_rate": 1e-12, "validate_every": 100}
    one, alone = train(make_trainer("one", rows=20_000, batch_size=20_000, **quiet))
    many, shared = run_in_processes(
        make_trainer("many", rows=20_000, batch_size=20_000, **quiet), 3, tmp_path / "meeting"
    )
    torch.testing.assert_close(one.B_rct @ one.A, many.B_rct @ many.A, atol=1e-5, rtol=1e-5)
    assert shared.reconstruction_error == pytest.approx(alone.reconstruction_error, rel=1e-5)


def test_processes_take_up_what_others_left(make_trainer, tmp_path: Path):
    """Two processes go on from a checkpoint of one, and one from theirs."""
    settings = {"dropout": 0.0, "epochs": 2}
    one, history = train(make_trainer("one", **settings))
    die(make_trainer("dying", **settings), 8)
    two, shared = run_in_processes(make_trainer("dying", **settings), 2, tmp_path / "meeting")
    assert_one_curve(history, shared)
    close(one, two, 1e-4)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_deepspeed_trains_as_one_process_would_and_resumes(make_trainer, tmp_path: Path, stage: int):
    alike = {"dropout": 0.0, "epochs": 2, "clip": 0.1}
    one, history = train(make_trainer("one", **alike))
    die(make_trainer("many", **alike), 8)
    settings = alike | {"strategy": "deepspeed", "zero_stage": stage, "accumulate": 2}
    many, shared = run_in_processes(make_trainer("many", **settings), 2, tmp_path / "meeting")
    assert_one_curve(history, shared)
    close(one, many, 1e-4)
    again, _ = train(make_trainer("many", **alike))  # what it left is everyone's checkpoint
    close(again, many, 0.0)


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
