"""What was logged can be read back with each tracker's own means."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pema_ray.errors import UserError
from pema_ray.training.tracking import make_trackers

CURVE = {1: 3.0, 2: 2.5, 5: 2.25}


def track(kind: str, folder: Path) -> None:
    (tracker,) = make_trackers([kind], folder, "bible r=6", {"rank": 6, "kappa": 0.2})
    for step, loss in CURVE.items():
        tracker.log(step, {"train/loss": loss, "train/prediction": loss / 2})
    tracker.close()


def test_tensorboard(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == CURVE


def test_tensorboard_shows_once_what_is_logged_again(tmp_path: Path):
    """A run that died at step 5 goes on from its checkpoint at step 2."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((1, 5, 3.0), (3, 7, 2.0)):
        (tracker,) = make_trackers(["tensorboard"], tmp_path, "x", {})
        for step in range(first, last + 1):
            tracker.log(step, {"train/loss": value})
        tracker.close()
        time.sleep(1.1)  # event files are read in the order of their names, which end in seconds
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 3.0), (2, 3.0), *((step, 2.0) for step in range(3, 8))]


def test_mlflow_in_the_runs_folder(tmp_path: Path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")  # set by the tracker, taken back after the test
    track("mlflow", tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("pema-ray").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "bible r=6"
    assert run.data.params == {"rank": "6", "kappa": "0.2"}
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")} == CURVE


def leveldb_records(log: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """What a W&B run file holds: records in LevelDB's log format, after a header of its own."""
    at, parts = header, b""
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)  # kind: 1 whole, 2 first, 3 middle, 4 last
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_a_training_that_is_taken_up_goes_on_in_its_mlflow_run(tmp_path: Path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    track("mlflow", tmp_path)
    track("mlflow", tmp_path)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("pema-ray").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2 * len(CURVE)


def test_a_tracker_whose_server_fails_does_not_end_the_training(tmp_path: Path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")

    def unreachable(*_args, **_kwargs):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("mlflow.log_metrics", unreachable)
    track("mlflow", tmp_path)
    assert [record.message for record in caplog.records if "mlflow failed" in record.message] == [
        "train.trackers: mlflow failed, training continues without it: the server is gone"
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    track("wandb", tmp_path)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    curve, deadline = {}, time.monotonic() + 30
    while curve != CURVE and time.monotonic() < deadline:  # W&B's own process writes asynchronously
        for data in leveldb_records(log.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            if "train/loss" in items:
                curve[int(items["_step"])] = float(items["train/loss"])
        time.sleep(0.1)
    assert curve == CURVE


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=f"{kind} is not installed where the workers run: pip install {kind}"):
        track(kind, tmp_path)
