"""Classification, regression and yes/no questions: one answer for a whole sequence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.tasks.reading import TaskExample, read_bioasq, read_table
from pema_ray.pluglm.tasks.scores import metric_names, require_metric, score, yes_no_scores
from pema_ray.pluglm.tasks.task import Feature, FinetuningTask


class Classification(FinetuningTask):
    """One of several labels.

    Args:
        columns: (text, pair or None, label) in table files.
        header: whether .tsv and .csv files name their columns.
        metric: `evaluate`-style: `accuracy`, `f1`, `glue/mrpc`, …
    """

    kind: ClassVar[str] = "classification"

    def __init__(
        self,
        columns: tuple[str, str | None, str] = ("sentence", None, "label"),
        header: bool = True,
        metric: str = "accuracy",
    ) -> None:
        self.metric, self._columns, self._header = metric, columns, header
        self.main = metric_names(metric)[0]
        self.labels: list[str] = []

    def model_class(self) -> Any:
        from pema_ray.pluglm.model.heads import PlugLMForSequenceClassification

        return PlugLMForSequenceClassification

    def head(self) -> dict[str, Any]:
        names = dict(enumerate(self.labels))
        return {
            "problem_type": "single_label_classification",
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }

    def read(self, path: Path) -> list[TaskExample]:
        text, pair, label = self._columns
        return read_table(path, text, pair, label, self._header)

    def prepare(self, train: Sequence[TaskExample]) -> None:
        labels = {str(example.label) for example in train if example.label is not None}
        if len(labels) < 2:
            raise UserError(f"Training examples have {len(labels)} labels in column '{self._columns[2]}', at least 2.")
        are_integers = all(re.fullmatch(r"-?\d+", label) for label in labels)
        self.labels = sorted(labels, key=int) if are_integers else sorted(labels)
        require_metric(self.metric, len(self.labels))

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        if not examples:
            return []
        pairs = [example.pair for example in examples] if examples[0].pair else None
        encoded = tokenizer(
            [example.text for example in examples], pairs, truncation=True, max_length=max_tokens,
            return_token_type_ids=True,
        )  # fmt: skip
        return [
            Feature(number, token_ids, type_ids, self._target(example))
            for number, (example, token_ids, type_ids) in enumerate(
                zip(examples, encoded["input_ids"], encoded["token_type_ids"])
            )
        ]

    def _target(self, example: TaskExample) -> dict[str, Any]:
        if example.label is None:
            return {}
        if str(example.label) not in self.labels:
            raise UserError(f"Example {example.id}: label '{example.label}' is not in the training examples.")
        return {"labels": self.labels.index(str(example.label))}

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        if any(not feature.targets for feature in features):
            return {}
        return {"labels": torch.tensor([feature.targets["labels"] for feature in features])}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        return [self.labels[number] for number in output.logits.argmax(-1).tolist()]

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        classes = {label: number for number, label in enumerate(self.labels)}
        references = [classes[str(gold(example))] for example in examples]
        return score(self.metric, [classes[answers[example.id]] for example in examples], references)


class YesNo(Classification):
    """BioASQ's yes/no questions; class 1 is yes."""

    kind: ClassVar[str] = "yes_no"

    def __init__(self) -> None:
        super().__init__(metric="accuracy")
        self.main, self.labels = "macro_f1", ["no", "yes"]

    def read(self, path: Path) -> list[TaskExample]:
        return read_bioasq(path, "yesno")

    def prepare(self, train: Sequence[TaskExample]) -> None:
        pass

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        references = [int(gold(example) == "yes") for example in examples]
        return yes_no_scores([int(answers[example.id] == "yes") for example in examples], references)


class Regression(Classification):
    """A number."""

    kind: ClassVar[str] = "regression"

    def __init__(
        self, columns: tuple[str, str | None, str] = ("sentence", None, "label"), header: bool = True,
        metric: str = "glue/stsb",
    ) -> None:  # fmt: skip
        super().__init__(columns, header, metric)
        require_metric(metric, None)

    def head(self) -> dict[str, Any]:
        return {"problem_type": "regression", "num_labels": 1}

    def prepare(self, train: Sequence[TaskExample]) -> None:
        pass

    def _target(self, example: TaskExample) -> dict[str, Any]:
        return {} if example.label is None else {"labels": number_of(example)}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        return output.logits.squeeze(-1).tolist()

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        for example in examples:
            gold(example)
        references = [number_of(example) for example in examples]
        return score(self.metric, [answers[example.id] for example in examples], references)


def number_of(example: TaskExample) -> float:
    try:
        return float(example.label)
    except (TypeError, ValueError):
        raise UserError(f"Example {example.id}: label {example.label!r} is no number.") from None


def gold(example: TaskExample) -> Any:
    """The example's label. Raises `UserError` if it has none."""
    if example.label is None:
        raise UserError(f"Example {example.id} has no label to score against.")
    return example.label
