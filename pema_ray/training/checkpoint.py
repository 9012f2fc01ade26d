"""What a resumed run needs: a safetensors file with groups of tensors and JSON, and a log of points. Knows no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.training.history import H, Point, TrainerHistory

CHECKPOINT = "checkpoint.safetensors"
"""The file's name in a run's folder; `ray_loop.run_workers` removes it when a run is not to be resumed."""
BEST, POINTS = "best.safetensors", "points.jsonl"
_MODEL, _OPTIMIZER = "model", "optimizer"  # groups of a checkpoint
_REMEDY = "training then resumes from Ray Train's copy, or starts over where there is none."

Tensors = dict[str, torch.Tensor]
Groups = dict[str, Tensors]


@dataclass(frozen=True)
class SavedRun(Generic[H]):
    """A run as its checkpoint holds it, after `step` steps."""

    path: Path
    step: int
    model: Tensors
    optimizer: Tensors
    history: H
    state: dict[str, Any]

    def load_into(self, model: nn.Module) -> None:
        """Give the model the saved weights.

        Raises:
            UserError: it has another shape.
        """
        try:
            model.load_state_dict(self.model)
        except RuntimeError:
            raise UserError(
                f"{self.path}: holds a model of another shape. Start over with train.resume=false, or take another "
                "run_dir."
            ) from None


class RunCheckpoint:
    """The checkpoint in a run's folder, with the log of its history's points and the best model beside it."""

    def __init__(self, run_dir: Path) -> None:
        self.path, self._best, self._log = run_dir / CHECKPOINT, run_dir / BEST, PointLog(run_dir / POINTS)
        self._logged = {"train": 0, "validation": 0}

    def save(
        self, step: int, model: nn.Module, optimizer: Tensors, history: TrainerHistory, state: Mapping[str, Any]
    ) -> None:
        """Write the run as it is after `step` steps.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        for kind, logged in self._logged.items():
            points = getattr(history, kind)
            self._log.append({"kind": kind, **point} for point in points[logged:])
            self._logged[kind] = len(points)
        without_points = replace(history, train=[], validation=[]).to_dict()
        described = {"step": step, "history": without_points, "points_bytes": self._log.size, "state": state}
        save_checkpoint(self.path, {_MODEL: model.state_dict(), _OPTIMIZER: optimizer}, described)

    def load(self, kind: type[H], train_points: bool = True) -> SavedRun[H]:
        """Read what `save` wrote, on the CPU.

        Args:
            kind: the class of the history.
            train_points: include the points of single steps; off in processes that do not save.

        Raises:
            UserError: the checkpoint or its log is damaged, or of another version.
        """
        groups, described = load_checkpoint(self.path)
        if _MODEL not in groups or not described.keys() >= {"step", "history", "points_bytes", "state"}:
            raise UserError(f"{self.path}: is of another version of this project. Start over with train.resume=false.")
        points: dict[str, list[Point]] = {name: [] for name in self._logged}
        for point in self._log.read(described["points_bytes"]):
            points[point.pop("kind")].append(point)
        self._logged = {name: len(of_kind) for name, of_kind in points.items()}
        if not train_points:
            points["train"] = []
        history = kind.from_dict({**described["history"], **points})
        optimizer = groups.get(_OPTIMIZER, {})
        return SavedRun(self.path, described["step"], groups[_MODEL], optimizer, history, described["state"])

    def save_best(self, model: nn.Module) -> None:
        save_checkpoint(self._best, {_MODEL: model.state_dict()})

    def load_best(self, model: nn.Module) -> None:
        model.load_state_dict(load_checkpoint(self._best)[0][_MODEL])


def save_checkpoint(
    path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], described: Mapping[str, Any] | None = None
) -> None:
    """Write `{group: {name: tensor}}` and JSON values under a temporary name, and move it into place.

    Args:
        groups: group names without a dot; tensors of any device. Tensors that share memory are written one by one.
        described: some kilobytes of JSON values; what grows with the run belongs in a `PointLog`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: json.dumps(value) for name, value in (described or {}).items()}
    with atomic_file(path) as temporary:
        try:
            save_file(_flat(groups), temporary, metadata)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error


def load_checkpoint(path: Path) -> tuple[Groups, dict[str, Any]]:
    """What `save_checkpoint` wrote, on the CPU; a group without tensors is missing.

    Raises:
        UserError: the file is damaged; it says what to delete.
    """
    groups: Groups = {}
    try:
        with safe_open(path, framework="pt") as file:
            described = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            for name in file.keys():  # noqa: SIM118
                group, _, rest = name.partition(".")
                groups.setdefault(group, {})[rest] = file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged checkpoint: {error}. Delete it: {_REMEDY}") from None
    return groups, described


class PointLog:
    """The points of a run as JSON lines beside its checkpoint, which says how many bytes of them are valid.

    Points are appended before the checkpoint that counts them is written. So a checkpoint stays small, however long
    the run, and lines written after the last checkpoint are cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.size = path, 0

    def append(self, points: Iterable[Mapping[str, Any]]) -> int:
        """Write points behind the valid ones; returns the bytes that are valid now.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            with self._path.open("ab") as file:
                if file.tell() < self.size:
                    raise OSError("another process has shortened it")
                file.truncate(self.size)
                lines = b"".join(json.dumps(point).encode() + b"\n" for point in points)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                self.size += len(lines)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror or error}.") from None
        return self.size

    def read(self, size: int) -> list[dict[str, Any]]:
        """The points in the first `size` bytes.

        Raises:
            UserError: there are fewer bytes, or they are damaged.
        """
        try:
            with self._path.open("rb") as file:
                lines = file.read(size)
            points = [json.loads(line) for line in lines.splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: damaged: {error}. Delete the checkpoint beside it: {_REMEDY}") from None
        if len(lines) < size:
            raise UserError(f"{self._path}: ends too early. Delete the checkpoint beside it: {_REMEDY}")
        self.size = size
        return points


def _flat(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for group, tensors in groups.items():
        assert "." not in group, f"a group of tensors must not be named '{group}'"
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            flat[f"{group}.{name}"] = tensor.clone() if storage in storages else tensor  # such as tied weights
            storages.add(storage)
    return flat
