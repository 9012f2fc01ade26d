"""What a resumed run needs, as one safetensors file: named groups of tensors, and JSON beside them. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pema_ray.errors import UserError
from pema_ray.memory.shards import atomic_file

CHECKPOINT = "checkpoint.safetensors"
"""The file's name in a run's folder; `ray_loop.run_workers` removes it when a run is not to be resumed."""

Groups = dict[str, dict[str, torch.Tensor]]


def save_checkpoint(
    path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], described: Mapping[str, Any] | None = None
) -> None:
    """Write `{group: {name: tensor}}` and JSON values under a temporary name, and move it into place.

    Args:
        groups: group names without a dot; tensors of any device. Tensors that share memory are written one by one.
        described: whatever JSON can say: the step, the history.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {name: json.dumps(value) for name, value in (described or {}).items()}
    with atomic_file(path) as temporary:
        try:
            save_file(_flat(groups), temporary, told)
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
        raise UserError(f"{path}: damaged checkpoint: {error}. Delete it to start over.") from None
    return groups, described


def _flat(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for group, tensors in groups.items():
        assert "." not in group, f"a group of tensors must not be named '{group}'"
        for name, tensor in tensors.items():
            found = tensor.detach().cpu().contiguous()
            storage = found.untyped_storage().data_ptr()
            flat[f"{group}.{name}"] = found.clone() if storage in storages else found  # tied weights, for one
            storages.add(storage)
    return flat
