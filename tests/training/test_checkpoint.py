"""A checkpoint comes back as it went in, replaces the last one whole or not at all, and is refused when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.training.checkpoint import PointLog, load_checkpoint, save_checkpoint

GROUPS = {
    "model": {"layer.0.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer": {"layer.0.weight.step": torch.tensor(4.0), "group:0.step:number": torch.tensor(7)},
}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        one[group].keys() == two[group].keys()
        and all(
            a.dtype == two[group][name].dtype and torch.equal(a, two[group][name]) for name, a in one[group].items()
        )
        for group in one
    )


def test_groups_and_described_values_come_back(tmp_path: Path):
    described = {"step": 4, "history": {"train": [{"loss": 0.1}], "best": float("inf")}, "name": "ä"}
    save_checkpoint(tmp_path / "a" / "checkpoint.safetensors", GROUPS, described)
    groups, loaded = load_checkpoint(tmp_path / "a" / "checkpoint.safetensors")
    assert same(groups, GROUPS) and loaded == described
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint.safetensors"]


def test_tied_weights_and_views_are_kept(tmp_path: Path):
    table = torch.arange(12.0).reshape(4, 3)
    save_checkpoint(tmp_path / "c", {"model": {"input": table, "output": table, "turned": table.T, "row": table[1]}})
    (model,) = load_checkpoint(tmp_path / "c")[0].values()
    assert torch.equal(model["input"], table) and torch.equal(model["output"], table)
    assert torch.equal(model["turned"], table.T) and torch.equal(model["row"], table[1])


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, kept: int):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, GROUPS, {"step": 4})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"checkpoint.safetensors: damaged checkpoint: .*Delete it: training"):
        load_checkpoint(path)


def test_values_that_are_no_json_are_damage(tmp_path: Path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, GROUPS, {"step": "four"})
    path.write_bytes(path.read_bytes().replace(b'\\"four\\"', b'\\"four  '))
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_checkpoint(path)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch):
    from safetensors import SafetensorError

    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, GROUPS, {"step": 4})

    def full(tensors, file, described) -> None:
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("pema_ray.training.checkpoint.save_file", full)
    with pytest.raises(UserError, match="checkpoint.safetensors: cannot be written: No space left on device"):
        save_checkpoint(path, GROUPS, {"step": 8})
    groups, described = load_checkpoint(path)
    assert same(groups, GROUPS) and described == {"step": 4}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_points_come_back_as_far_as_a_checkpoint_counts_them(tmp_path: Path):
    log = PointLog(tmp_path / "points.jsonl")
    first = log.append([{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("inf")}])
    log.append([{"step": 3, "loss": 0.1}])  # and then the run died, before its checkpoint
    resumed = PointLog(tmp_path / "points.jsonl")
    assert resumed.read(first) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("inf")}]
    size = resumed.append([{"step": 3, "loss": 0.2}])
    assert [point["loss"] for point in PointLog(tmp_path / "points.jsonl").read(size)] == [0.5, float("inf"), 0.2]


def test_missing_points_are_an_error(tmp_path: Path):
    log = PointLog(tmp_path / "points.jsonl")
    size = log.append([{"step": 1}, {"step": 2}])
    (tmp_path / "points.jsonl").write_bytes(b'{"step": 1}\n')
    with pytest.raises(UserError, match=r"points.jsonl: ends too early. Delete the checkpoint"):
        PointLog(tmp_path / "points.jsonl").read(size)
    with pytest.raises(UserError, match=r"points.jsonl: cannot be written: another process has shortened it"):
        log.append([{"step": 3}])
    (tmp_path / "points.jsonl").unlink()
    with pytest.raises(UserError, match=r"points.jsonl: damaged: .*No such file"):
        PointLog(tmp_path / "points.jsonl").read(size)
