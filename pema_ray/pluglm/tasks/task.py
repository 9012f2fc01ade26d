"""What a task is to the fine-tuning loop: how files become features, and how outputs become scores.

Shapes: B features, T positions, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from pema_ray.pluglm.tasks.reading import TaskExample


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of the model, made of an example or a part of it.

    Attributes:
        example: which one, by its place.
        targets: what the loss needs, by the names of the model's arguments; empty: not known.
        spans: where each token came from in the passage; none of those that did not.
    """

    example: int
    token_ids: list[int]
    type_ids: list[int]
    targets: Mapping[str, Any]
    spans: tuple[tuple[int, int] | None, ...] = ()


class FinetuningTask(Protocol):
    """A kind of task with the settings of one run."""

    kind: ClassVar[str]

    @property
    def main(self) -> str:
        """The score that decides which model is kept."""
        ...

    def model_class(self) -> Any:
        """What is fine-tuned."""
        ...

    def head(self) -> dict[str, Any]:
        """Fields of the model's config: labels, and the like."""
        ...

    def read(self, path: Path) -> list[TaskExample]: ...

    def prepare(self, train: Sequence[TaskExample]) -> None:
        """Learn the labels from the training examples."""
        ...

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]: ...

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        """The targets as tensors, padded to `length`; none where a feature has none."""
        ...

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        """What the model says about each feature, as JSON has it."""
        ...

    def answers(self, examples: Sequence[TaskExample], said: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """One answer for each example or group, by id; `said`: (example, what was decoded) of all features."""
        ...

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        """Raises `UserError` for examples without labels."""
        ...

    def label_text(self, example: TaskExample) -> str:
        """The label in words, for in-task memory."""
        ...
