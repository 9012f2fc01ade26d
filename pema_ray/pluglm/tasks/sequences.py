"""Classification, regression and yes/no questions: one answer for a whole sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.tasks.reading import TaskExample, read_bioasq, read_table
from pema_ray.pluglm.tasks.scores import metric_names, require_metric, score, yes_no_scores
from pema_ray.pluglm.tasks.task import Feature


class Classification:
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
        self._metric_names = metric_names(metric)
        self.labels: list[str] = []

    @property
    def main(self) -> str:
        return self._metric_names[0]

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
        found = {str(example.label) for example in train if example.label is not None}
        if len(found) < 2:
            raise UserError(f"Training examples have {len(found)} labels in column '{self._columns[2]}', at least 2.")
        whole = all(one.lstrip("-").isdigit() for one in found)
        self.labels = sorted(found, key=int) if whole else sorted(found)
        require_metric(self.metric, len(self.labels))

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        found = encoded(examples, tokenizer, max_tokens)
        return [
            Feature(number, token_ids, type_ids, self._target(example))
            for number, (example, (token_ids, type_ids)) in enumerate(zip(examples, found))
        ]

    def _target(self, example: TaskExample) -> dict[str, Any]:
        if example.label is None:
            return {}
        if str(example.label) not in self.labels:
            raise UserError(f"Example {example.id}: label '{example.label}' is not in the training examples.")
        return {"labels": self.labels.index(str(example.label))}

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        if any(not one.targets for one in features):
            return {}
        return {"labels": torch.tensor([one.targets["labels"] for one in features])}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        return [self.labels[number] for number in output.logits.argmax(-1).tolist()]

    def answers(self, examples: Sequence[TaskExample], said: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        return {examples[number].id: answer for number, answer in said}

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        wanted = [str(gold(example)) for example in examples]
        found = [answers[example.id] for example in examples]
        number = {label: place for place, label in enumerate(self.labels)}
        return score(self.metric, [number[one] for one in found], [number[one] for one in wanted])

    def label_text(self, example: TaskExample) -> str:
        return str(example.label)


class YesNo(Classification):
    """BioASQ's yes/no questions; class 1 is yes."""

    kind: ClassVar[str] = "yes_no"

    def __init__(self) -> None:
        super().__init__(metric="accuracy")
        self.labels = ["no", "yes"]

    @property
    def main(self) -> str:
        return "macro_f1"

    def read(self, path: Path) -> list[TaskExample]:
        return read_bioasq(path, "yesno")

    def prepare(self, train: Sequence[TaskExample]) -> None:
        pass

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        wanted = [int(gold(example) == "yes") for example in examples]
        return yes_no_scores([int(answers[example.id] == "yes") for example in examples], wanted)


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
        return score(self.metric, [answers[one.id] for one in examples], [number_of(one) for one in examples])


def number_of(example: TaskExample) -> float:
    try:
        return float(example.label)
    except (TypeError, ValueError):
        raise UserError(f"Example {example.id}: label {example.label!r} is no number.") from None


def gold(example: TaskExample) -> Any:
    """Its label. Raises `UserError` where there is none."""
    if example.label is None:
        raise UserError(f"Example {example.id} has no label to score against.")
    return example.label


def encoded(
    examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int, cut: str | bool = True
) -> list[tuple[list[int], list[int]]]:
    """(token ids, type ids) of examples; of pairs, the longer text is cut first."""
    if not examples:
        return []
    pairs = [example.pair for example in examples] if examples[0].pair else None
    found = tokenizer(
        [example.text for example in examples], pairs, truncation=cut, max_length=max_tokens,
        return_token_type_ids=True,
    )  # fmt: skip
    return list(zip(found["input_ids"], found["token_type_ids"]))
