"""What tests of trainings share: a run with the model that it leaves, and runs that die at a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pema_ray.training.trainer import Trainer


def train(trainer: Trainer) -> tuple[Any, Any]:
    """(model, history) of a training to its end."""
    history = trainer.run()
    return trainer.model, history


class Killed(Exception):
    pass


def die(trainer: Trainer, step: int, kind: str = "train") -> None:
    """Run, and die when this point is reported."""

    def on_point(reported_kind: str, point: Mapping[str, Any]) -> None:
        if (reported_kind, point["step"]) == (kind, step):
            raise Killed

    trainer.on_point = on_point
    with pytest.raises(Killed):
        trainer.run()
