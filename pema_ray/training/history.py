"""The figures of a training: what it reports while it runs, and their history. Knows nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Point = dict[str, Any]
"""`{"step": …, "loss": …, …}`: JSON numbers, measured after `step` steps of the optimiser."""
OnPoint = Callable[[str, Mapping[str, Any]], None]
"""`on_point(kind, point)`: `kind` is "train" or "validation"."""
OnSaved = Callable[[Mapping[str, Any]], None]
"""`on_saved(metrics)`: called by every process once its checkpoint is saved; metrics are numbers, `step` among them."""

_RENAMED = {"best_prediction": "best_loss"}  # in histories of adapters
H = TypeVar("H", bound="TrainerHistory")


@dataclass
class TrainerHistory:
    """Points and best validation of a training; JSON beside the model."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    """The trainer's `score` of the best validation."""
    stale: int = 0
    """Validations since the best one."""
    stopped_early: bool = False
    seconds: float = 0.0
    """Time of all steps, including waits for batches, excluding validations and checkpoints."""
    peak_bytes: int = 0
    """Peak memory of the leading process (its GPU's, where it has one)."""

    def add_validation(self, point: Point, score: float, patience: int | None) -> bool:
        """Record a validation; returns whether it is the best so far.

        Args:
            score: lower is better.
            patience: `stopped_early` is set after so many validations without improvement; None: never.
        """
        self.validation.append(point)
        if score < self.best_loss:
            self.best_loss, self.best_step, self.stale = score, point["step"], 0
            return True
        self.stale += 1
        self.stopped_early = patience is not None and self.stale >= patience
        return False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[H], data: Mapping[str, Any]) -> H:
        """Inverse of `to_dict`; unknown keys, of earlier versions, are ignored."""
        renamed = {_RENAMED.get(name, name): value for name, value in data.items()}
        return cls(**{name: value for name, value in renamed.items() if name in cls.__dataclass_fields__})
