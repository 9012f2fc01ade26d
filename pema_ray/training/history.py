"""What a training tells while it runs, and what is left of that. Knows nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Point = dict[str, Any]
"""`{"step": …, "loss": …, …}`: JSON numbers, measured after so many steps of the optimiser."""
OnPoint = Callable[[str, Mapping[str, Any]], None]
"""`on_point(kind, point)`: `kind` is "train" or "validation"."""
OnSaved = Callable[[Mapping[str, Any]], None]
"""`on_saved(metrics)`: every process calls it once its checkpoint is saved; metrics are numbers, `step` among them."""

_RENAMED = {"best_prediction": "best_loss"}  # in histories of adapters
H = TypeVar("H", bound="TrainerHistory")


@dataclass
class TrainerHistory:
    """What a training went through; JSON beside the model."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    """Of the model that is kept: the trainer's `score` of its validation."""
    stale: int = 0
    """Validations since then."""
    stopped_early: bool = False
    seconds: float = 0.0
    """Of the steps, waiting for their batches included, without validations and checkpoints."""
    peak_bytes: int = 0
    """Most memory that the leading process has held (its GPU's, where it has one)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[H], data: Mapping[str, Any]) -> H:
        """Of `to_dict`, also of an earlier version's: keys that are gone are passed over."""
        renamed = {_RENAMED.get(name, name): value for name, value in data.items()}
        return cls(**{name: value for name, value in renamed.items() if name in cls.__dataclass_fields__})
