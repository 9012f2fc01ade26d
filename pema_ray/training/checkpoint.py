"""What a resumed run needs, as one safetensors file: named groups of tensors, and JSON beside them. Knows no model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file

CHECKPOINT = "checkpoint.safetensors"
"""The file's name in a run's folder; `ray_loop.run_workers` removes it when a run is not to be resumed."""
_REMEDY = "training then resumes from Ray Train's copy, or starts over where there is none."

Groups = dict[str, dict[str, torch.Tensor]]


def save_checkpoint(
    path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], described: Mapping[str, Any] | None = None
) -> None:
    """Write `{group: {name: tensor}}` and JSON values under a temporary name, and move it into place.

    Args:
        groups: group names without a dot; tensors of any device. Tensors that share memory are written one by one.
        described: whatever JSON can say in some kilobytes; what grows with the run belongs into a `PointLog`.

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
    """What a run measured, point by point, as JSON lines beside its checkpoint, which says how much of it counts.

    Points are appended before the checkpoint that counts them is written: a checkpoint stays small, however long the
    run, and lines of a run that died after its last checkpoint are cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.size = path, 0

    def append(self, points: Iterable[Mapping[str, Any]]) -> int:
        """Write points behind those that count; returns the bytes that count now.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            with self._path.open("ab") as file:
                if file.tell() < self.size:
                    raise OSError("somebody has shortened it")
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
        """The points that count, for a checkpoint that says `size` bytes do.

        Raises:
            UserError: they are not there.
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
            whole = tensor.detach().cpu().contiguous()
            storage = whole.untyped_storage().data_ptr()
            flat[f"{group}.{name}"] = whole.clone() if storage in storages else whole  # tied weights, for one
            storages.add(storage)
    return flat
