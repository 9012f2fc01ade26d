"""The Ray loop brings back what workers say, starts them again when they die, and not for ever."""

from __future__ import annotations

import json
import os
import signal
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.config import TrainingConfig
from pema_ray.training.ray_loop import _following, _retry_deaths_at_start, _worker, reporting, run_workers, worker_place

CONFIG = TrainingConfig(cpus_per_worker=0.5)


@pytest.fixture
def alone(monkeypatch) -> None:
    """This process is a lone worker of Ray Train."""
    context = types.SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))


def test_a_failure_that_comes_back_is_told_and_not_tried_for_ever(alone, tmp_path: Path):
    """Once or twice the machine may be at fault; after three equal errors at the same step the program is."""
    errors = iter([RuntimeError("out of luck"), *[OSError("no route")] * 4, *[RuntimeError("out of memory")] * 3])

    def fail(settings: None) -> dict:
        raise next(errors)

    job = {"work": fail, "settings": None, "run_dir": tmp_path}
    for _ in range(8):
        with pytest.raises((RuntimeError, OSError)):
            assert not _worker(job)["error"]
    assert "fails the same way every time, after step 0: RuntimeError: out of memory" in _worker(job)["error"]


def test_only_the_leading_worker_reports_points(alone, tmp_path: Path):
    place = worker_place(CONFIG)
    assert (place.rank, place.world, place.device, place.leads) == (0, 1, torch.device("cpu"), True)
    for rank in (1, 0):
        with reporting(tmp_path, type(place)(rank, 2), CONFIG, "name", {"seed": 1}) as on_point:
            on_point("train", {"step": 3, "loss": 0.5 + rank})
    points = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert points == [{"kind": "train", "step": 3, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("retries", [0, 2, -1])
def test_a_death_at_the_start_is_survived_as_often_as_the_settings_say(retries: int):
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError

    starts: list[int] = []

    def run() -> dict:
        starts.append(1)
        if len(starts) < 6:
            raise ControllerError(ActorDiedError())
        return {}

    if retries < 0:
        assert _retry_deaths_at_start(run, retries) == {} and len(starts) == 6
    else:
        with pytest.raises(ControllerError):
            _retry_deaths_at_start(run, retries)
        assert len(starts) == retries + 1


def make_sum_of_ranks() -> Callable[[dict], dict]:
    """Makes the work of a worker; a closure, so that it travels by value."""

    def sum_of_ranks(settings: dict) -> dict:
        """Adds up the ranks over processes; the first leading worker dies."""
        place, folder = worker_place(CONFIG), Path(settings["folder"])
        if place.leads and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if settings.get("refuse") == place.rank:
            raise UserError(f"rank {place.rank} does not want to")
        total = torch.tensor(place.rank + 1)
        torch.distributed.all_reduce(total)
        with reporting(folder, place, CONFIG, "sum", {}) as on_point:
            on_point("train", {"step": 1, "loss": float(total)})
        return {"total": int(total), "resumed": (folder / CHECKPOINT).exists()}

    return sum_of_ranks


@pytest.mark.cluster
def test_workers_meet_die_are_started_again_and_refuse(ray_cluster, tmp_path: Path):
    points: list[tuple] = []
    (tmp_path / CHECKPOINT).touch()
    config = CONFIG.model_copy(update={"workers": 2, "resume": False, "max_failures": 3})
    settings: dict = {"folder": str(tmp_path)}
    outcome = run_workers(make_sum_of_ranks(), settings, tmp_path, config, lambda *point: points.append(point))
    assert (tmp_path / "died").exists()
    assert outcome.returned == {"total": 3, "resumed": False} and outcome.metrics == {}
    assert points == [("train", {"step": 1, "loss": 3.0})]
    with pytest.raises(UserError, match="^rank 1 does not want to$"):
        run_workers(make_sum_of_ranks(), settings | {"refuse": 1}, tmp_path, config)


def test_points_are_followed_while_they_are_written_and_only_whole_lines(tmp_path: Path):
    path, seen, three_seen = tmp_path / "progress.jsonl", [], threading.Event()

    def on_point(kind: str, point: Mapping) -> None:
        seen.append((kind, point["step"]))
        if len(seen) == 3:
            three_seen.set()

    def line(step: int) -> str:
        return json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n"

    path.write_text(line(99))  # left by an earlier run
    with _following(path, on_point), path.open("w") as file:
        file.write(line(1) + line(2) + line(3) + line(4)[:20])
        file.flush()
        os.fsync(file.fileno())
        assert three_seen.wait(30)
        file.write(line(4)[20:] + line(5))
    assert seen == [("train", step) for step in range(1, 6)]
