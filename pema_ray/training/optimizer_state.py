"""An optimiser's state as named tensors, whatever the optimiser: `<parameter>.<entry>`. Knows torch alone.

Python numbers are told from tensors by their names' ending; steps that are counted by group stand under `group:<i>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pema_ray.errors import UserError

_NUMBER = ":number"
_GROUP = "group:"


def entries(held: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """An optimiser's state of one parameter; numbers as tensors, under a name that says so."""
    for entry, value in held.items():
        if isinstance(value, Tensor):
            yield entry, value.detach()
        elif value is not None:  # a momentum that has not begun
            assert isinstance(value, int | float), f"an optimiser's state '{entry}' of {type(value)} cannot be saved"
            yield entry + _NUMBER, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def counted(optimizer: Any) -> dict[str, Tensor]:
    """Steps that an optimiser counts by group (LAMB, often)."""
    counts = {number: group["step"] for number, group in enumerate(optimizer.param_groups) if "step" in group}
    return {f"{_GROUP}{number}.{entry}": t for number, n in counts.items() for entry, t in entries({"step": n})}


def by_name(
    state: Mapping[str, Tensor], named: Mapping[str, nn.Parameter], optimizer: Any
) -> dict[str, dict[str, Tensor | float]]:
    """`{parameter: {entry: value}}` of its own; what was counted by group goes straight into the groups."""
    found: dict[str, dict[str, Tensor | float]] = {}
    for key, tensor in state.items():
        name, _, entry = key.rpartition(".")
        value = tensor.item() if entry.endswith(_NUMBER) else tensor.clone()
        entry = entry.removesuffix(_NUMBER)
        if name.startswith(_GROUP):
            number = int(name.removeprefix(_GROUP))
            if number >= len(optimizer.param_groups):
                raise foreign(key)
            optimizer.param_groups[number][entry] = value
        elif name in named:
            found.setdefault(name, {})[entry] = value
        else:
            raise foreign(key)
    return found


def foreign(key: str) -> UserError:
    return UserError(
        f"The checkpoint's optimiser state '{key}' is of another model or optimiser. "
        "Start over with train.resume=false."
    )
