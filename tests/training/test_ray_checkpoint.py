"""Ray Train's copies of checkpoints: reported by all workers, put back where a run has lost its own, kept in order."""

from __future__ import annotations

import errno
import json
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.training import ray_checkpoint
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.config import TrainingConfig
from pema_ray.training.ray_checkpoint import RAY_TRAIN, Storage, reporting_checkpoints, restore_checkpoint
from pema_ray.training.ray_loop import run_workers, worker_place
from pema_ray.training.strategies import Place

CONFIG = TrainingConfig(cpus_per_worker=0.5)
RECORD = "checkpoint_manager_snapshot.json"


def write_run(folder: Path, registered: tuple[str, ...] = ("checkpoint_b",)) -> Path:
    """What Ray Train leaves of a run: checkpoints a and b, of which it has registered some."""
    import ray

    for name in ("checkpoint_a", "checkpoint_b"):
        (folder / name).mkdir(parents=True)
        (folder / name / CHECKPOINT).write_text(name)
    results = [{"checkpoint_dir_name": name, "metrics": {"step": 4}} for name in registered]
    lists = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names",
             "timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")  # fmt: skip
    record = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "current_report_index": len(results),
        **{name: [] for name in lists},
    }
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ── storage ─────────────────────────────────────────────────────────────────


def test_a_run_is_kept_in_its_own_folder_or_under_a_name_of_its_own(tmp_path: Path):
    run_dir, elsewhere = tmp_path / "experiment" / "train", str(tmp_path / "elsewhere")
    run_dir.mkdir(parents=True)
    assert Storage.of(run_dir, None) == Storage(str(run_dir), RAY_TRAIN)
    first = Storage.of(run_dir, elsewhere)
    assert first.path == elsewhere and first.name.startswith("experiment-train-")
    assert Storage.of(run_dir, "s3://bucket/runs") == Storage("s3://bucket/runs", first.name)
    (run_dir / "stamp").write_text("other settings")
    others = {Storage.of(run_dir, elsewhere).name, Storage.of(run_dir.parent, elsewhere).name}
    assert len(others | {first.name}) == 3


def test_checkpoints_that_were_never_registered_are_deleted(tmp_path: Path):
    folder = write_run(tmp_path / RAY_TRAIN)
    Storage(str(tmp_path), RAY_TRAIN).prepare(resume=True, has_checkpoint=False)
    assert names(folder) == {"checkpoint_b", RECORD}


@pytest.mark.parametrize("uri", [False, True])
def test_a_run_that_is_not_to_be_resumed_leaves_nothing(tmp_path: Path, uri: bool):
    folder = write_run(tmp_path / RAY_TRAIN)
    Storage(tmp_path.as_uri() if uri else str(tmp_path), RAY_TRAIN).prepare(resume=False, has_checkpoint=False)
    assert names(folder) == set()


@pytest.mark.parametrize("record", ["", '{"ray_version": "1.0"}', "gone"])
def test_a_record_that_cannot_be_read_counts_only_where_there_is_no_other_checkpoint(tmp_path: Path, record: str):
    folder, storage = write_run(tmp_path / RAY_TRAIN), Storage(str(tmp_path), RAY_TRAIN)
    if record == "gone":  # what it names
        (folder / "checkpoint_b" / CHECKPOINT).unlink()
        (folder / "checkpoint_b").rmdir()
    else:
        (folder / RECORD).write_text(record)
    with pytest.raises(UserError, match=rf"{RECORD}: cannot be read: .* start over with train.resume=false"):
        storage.prepare(resume=True, has_checkpoint=False)
    storage.prepare(resume=True, has_checkpoint=True)
    assert names(folder) == set()


@pytest.mark.parametrize("path", ["nowhere://bucket", "{file}"])
def test_a_storage_path_that_cannot_be_used_is_named(tmp_path: Path, path: str):
    (tmp_path / "file").touch()
    config = CONFIG.model_copy(update={"storage_path": path.format(file=tmp_path / "file")})
    with pytest.raises(UserError, match="cannot be used as train.storage_path"):
        run_workers(lambda settings: {}, None, tmp_path / "run", config)


# ── restoring ───────────────────────────────────────────────────────────────


@pytest.fixture
def reported(monkeypatch, tmp_path: Path) -> Path:
    """The checkpoint that Ray Train gives this lone worker."""
    import ray.train

    folder = tmp_path / "reported"
    (folder / "model").mkdir(parents=True)
    for name in (CHECKPOINT, "best.safetensors", "model/config.json"):
        (folder / name).write_text(f"reported {name}")
    context = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: ray.train.Checkpoint.from_directory(str(folder)))
    return folder


def test_a_lost_checkpoint_is_put_back_with_all_that_belongs_to_it(reported: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    (run_dir / "model").mkdir(parents=True)
    for name in ("best.safetensors", "model/config.json", "model/newer.json", "history.json"):
        (run_dir / name).write_text("newer")
    restore_checkpoint(run_dir)
    assert names(run_dir) == {CHECKPOINT, "best.safetensors", "model", "history.json"}
    assert names(run_dir / "model") == {"config.json"}
    for name in (CHECKPOINT, "best.safetensors", "model/config.json"):
        assert (run_dir / name).read_text() == f"reported {name}"


def test_the_runs_own_checkpoint_goes_before(reported: Path, tmp_path: Path):
    (tmp_path / CHECKPOINT).write_text("newer")
    restore_checkpoint(tmp_path)
    assert (tmp_path / CHECKPOINT).read_text() == "newer" and not (tmp_path / "best.safetensors").exists()


def test_a_restore_that_is_broken_off_leaves_no_checkpoint(reported: Path, tmp_path: Path, monkeypatch):
    def full(source: Path, target: Path, **options) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises((UserError, OSError), match="No space left on device"):
        restore_checkpoint(tmp_path / "run")
    assert names(tmp_path / "run") == set()


# ── reporting ───────────────────────────────────────────────────────────────


def test_checkpoints_are_reported_at_most_every_two_seconds_and_the_last_one_always(tmp_path: Path, monkeypatch):
    """A report holds the checkpoint's files alone; an epoch's end 0.5 s after another is reported with the next."""
    clock, reports = [100.0], []

    def report(metrics: dict, checkpoint) -> None:
        files = {path.name: path.read_text() for path in Path(checkpoint.path).iterdir()}
        reports.append((metrics["step"], files))

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("ray.train.report", report)
    (tmp_path / "progress.jsonl").touch()
    with reporting_checkpoints(tmp_path, Place(), ("best.safetensors", "not there", CHECKPOINT)) as on_saved:
        for step, seconds in ((1, 0.5), (2, 1.6), (3, 0.1), (4, 0.1)):
            for name in (CHECKPOINT, "best.safetensors"):
                (tmp_path / name).unlink(missing_ok=True)
                (tmp_path / name).write_text(str(step))
            on_saved({"step": step})
            clock[0] += seconds
    assert reports == [(step, dict.fromkeys((CHECKPOINT, "best.safetensors"), str(step))) for step in (1, 3, 4)]
    assert names(tmp_path) == {CHECKPOINT, "best.safetensors", "progress.jsonl"}


def test_a_training_that_fails_reports_nothing_more_and_a_full_disk_is_told(tmp_path: Path, monkeypatch):
    def full(metrics: dict, checkpoint) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ray.train.report", full)
    with (
        pytest.raises(UserError, match="Ray Train cannot keep a checkpoint: No space left on device"),
        reporting_checkpoints(tmp_path, Place(), (CHECKPOINT,)) as on_saved,
    ):
        on_saved({"step": 1})


def make_work() -> Callable[[dict], dict]:
    """Makes the work of a worker, which saves and reports checkpoints; a closure, so that it travels by value."""

    def work(settings: dict) -> dict:
        ray_checkpoint.REPORT_SECONDS = settings["seconds"]
        place, folder = worker_place(CONFIG), Path(settings["folder"])
        resumed_step = int((folder / CHECKPOINT).read_text()) if (folder / CHECKPOINT).exists() else 0
        with reporting_checkpoints(folder, place, (CHECKPOINT,)) as on_saved:
            for step in range(resumed_step + 1, settings["steps"] + 1):
                torch.distributed.barrier()
                if place.leads:
                    (folder / CHECKPOINT).unlink(missing_ok=True)
                    (folder / CHECKPOINT).write_text(str(step))
                on_saved({"step": step, "loss": 1.0 / step, "rank": place.rank})
        return {"resumed_step": resumed_step}

    return work


@pytest.mark.cluster
def test_two_workers_report_every_checkpoint_and_one_resumes_from_the_last(ray_cluster, tmp_path: Path):
    from ray.train import Result

    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config = CONFIG.model_copy(update={"workers": 2, "storage_path": elsewhere.as_uri()})
    settings = {"folder": str(run_dir), "seconds": 0.0, "steps": 3}
    outcome = run_workers(make_work(), settings, run_dir, config)
    assert outcome.returned == {"resumed_step": 0}
    assert outcome.metrics == {"step": 3, "loss": 1 / 3, "rank": 0}
    (kept,) = elsewhere.iterdir()
    assert json.loads((kept / RECORD).read_text())["current_report_index"] == 3
    best = Result.from_path(str(kept)).best_checkpoints or []
    assert [metrics["step"] for _, metrics in best] == [2, 3]
    assert [(Path(checkpoint.path) / CHECKPOINT).read_text() for checkpoint, _ in best] == ["2", "3"]

    (run_dir / CHECKPOINT).unlink()
    alone = config.model_copy(update={"workers": 1})
    outcome = run_workers(make_work(), settings | {"steps": 6, "seconds": 60.0}, run_dir, alone)
    assert outcome.returned == {"resumed_step": 3} and outcome.metrics["step"] == 6
    assert json.loads((kept / RECORD).read_text())["current_report_index"] == 5  # 4, and 6 at the end
