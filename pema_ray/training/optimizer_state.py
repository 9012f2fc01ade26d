"""An optimiser's state as named tensors, whatever the optimiser: `<parameter>.<entry>`. Knows torch alone.

Python numbers have names that end in `:number`; steps counted by group have names that begin with `group:<i>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pema_ray.errors import UserError

_NUMBER = ":number"
_GROUP = "group:"


def state_entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The state of one parameter, numbers as tensors."""
    for entry, value in state.items():
        if isinstance(value, Tensor):
            yield entry, value.detach()
        elif value is not None:  # a momentum before its first step
            assert isinstance(value, int | float), f"an optimiser's state '{entry}' of {type(value)} cannot be saved"
            yield entry + _NUMBER, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def group_steps(optimizer: Any) -> dict[str, Tensor]:
    """Steps that an optimiser counts by group (LAMB, often)."""
    steps = {number: group["step"] for number, group in enumerate(optimizer.param_groups) if "step" in group}
    return {f"{_GROUP}{number}.{entry}": t for number, n in steps.items() for entry, t in state_entries({"step": n})}


def load_by_name(
    state: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: Any
) -> dict[str, dict[str, Tensor | float]]:
    """`{parameter: {entry: value}}` of a saved state; steps counted by group are written into the optimiser's groups.

    Raises:
        UserError: the state belongs to another model or optimiser.
    """
    states: dict[str, dict[str, Tensor | float]] = {}
    for key, tensor in state.items():
        name, _, entry = key.rpartition(".")
        value = tensor.item() if entry.endswith(_NUMBER) else tensor.clone()
        entry = entry.removesuffix(_NUMBER)
        if name.startswith(_GROUP):
            number = int(name.removeprefix(_GROUP))
            if number >= len(optimizer.param_groups):
                raise mismatch(key)
            optimizer.param_groups[number][entry] = value
        elif name in parameters:
            states.setdefault(name, {})[entry] = value
        else:
            raise mismatch(key)
    return states


def mismatch(key: str) -> UserError:
    return UserError(
        f"The checkpoint's optimiser state '{key}' is of another model or optimiser. "
        "Start over with train.resume=false."
    )
