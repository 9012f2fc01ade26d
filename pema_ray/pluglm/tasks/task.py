"""The interface of a task: from files to features, and from a model's outputs to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pema_ray.pluglm.tasks.reading import TaskExample


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of the model, made of an example or a part of it.

    Attributes:
        example: index of the example.
        targets: the loss's targets, by the names of the model's arguments; empty: unknown.
        spans: each token's place in the passage; None for other tokens.
    """

    example: int
    token_ids: list[int]
    type_ids: list[int]
    targets: Mapping[str, Any]
    spans: tuple[tuple[int, int] | None, ...] = ()


class FinetuningTask(ABC):
    """A kind of task with the settings of one run."""

    kind: ClassVar[str]
    main: str
    """The score that decides which model is kept."""

    @abstractmethod
    def model_class(self) -> Any:
        """The class of the fine-tuned model."""

    def head(self) -> dict[str, Any]:
        """Fields of the model's config, such as labels."""
        return {}

    @abstractmethod
    def read(self, path: Path) -> list[TaskExample]: ...

    def prepare(self, train: Sequence[TaskExample]) -> None:  # noqa: B027
        """Learn the labels from the training examples."""

    @abstractmethod
    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]: ...

    @abstractmethod
    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        """The targets as tensors, padded to `length`; empty if a feature has none."""

    @abstractmethod
    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        """The model's answer to each feature, in JSON."""

    def answers(self, examples: Sequence[TaskExample], decoded: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """One answer for each example or group, by id; `decoded`: (example, decoded answer) of all features."""
        return {examples[number].id: answer for number, answer in decoded}

    @abstractmethod
    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        """Raises `UserError` for examples without labels."""

    def label_text(self, example: TaskExample) -> str:
        """The label in words, for in-task memory."""
        return str(example.label)
