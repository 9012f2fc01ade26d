"""Token classification: a tag for each word, scored by whole entities (seqeval)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.tasks.reading import TaskExample, read_words
from pema_ray.pluglm.tasks.scores import entity_scores
from pema_ray.pluglm.tasks.sequences import gold
from pema_ray.pluglm.tasks.task import Feature, FinetuningTask


class Words(FinetuningTask):
    """Predicts a word's tag at its first token. Words beyond `max_tokens` go into further features."""

    kind: ClassVar[str] = "tokens"
    main = "f1"

    def __init__(self) -> None:
        self.labels: list[str] = []

    def model_class(self) -> Any:
        from pema_ray.pluglm.model.heads import PlugLMForTokenClassification

        return PlugLMForTokenClassification

    def head(self) -> dict[str, Any]:
        names = dict(enumerate(self.labels))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def read(self, path: Path) -> list[TaskExample]:
        return read_words(path)

    def prepare(self, train: Sequence[TaskExample]) -> None:
        self.labels = sorted({tag for example in train for tag in gold(example)})

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        windows = tokenizer(
            [list(example.words) for example in examples], is_split_into_words=True, truncation=True,
            max_length=max_tokens, return_overflowing_tokens=True, return_token_type_ids=True,
        )  # fmt: skip
        features, last_words = [], {}
        for part, (number, types) in enumerate(zip(windows["overflow_to_sample_mapping"], windows["token_type_ids"])):
            spans: list[tuple[int, int] | None] = []
            for word in windows.word_ids(part):
                is_first = word is not None and word > last_words.get(number, -1)
                if is_first:
                    last_words[number] = word
                spans.append((word, word + 1) if word is not None and is_first else None)
            target = self._target(examples[number], spans)
            features.append(Feature(number, windows["input_ids"][part], types, target, tuple(spans)))
        return features

    def _target(self, example: TaskExample, spans: Sequence[tuple[int, int] | None]) -> dict[str, Any]:
        if example.label is None:
            return {}
        for tag in example.label:
            if tag not in self.labels:
                raise UserError(f"Sentence {example.id}: tag '{tag}' is not in the training examples.")
        tags = [IGNORED if span is None else self.labels.index(example.label[span[0]]) for span in spans]
        return {"labels": tags}

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        if any(not feature.targets for feature in features):
            return {}
        rows = [[*feature.targets["labels"], *[IGNORED] * (length - len(feature.token_ids))] for feature in features]
        return {"labels": torch.tensor(rows)}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        best = output.logits.argmax(-1).tolist()
        return [
            [(span[0], self.labels[best[row][place]]) for place, span in enumerate(feature.spans) if span is not None]
            for row, feature in enumerate(features)
        ]

    def answers(self, examples: Sequence[TaskExample], decoded: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        answers = {example.id: ["O"] * len(example.words) for example in examples}
        for number, tags in decoded:
            for word, tag in tags:
                answers[examples[number].id][word] = tag
        return answers

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        return entity_scores([answers[example.id] for example in examples], [gold(example) for example in examples])

    def label_text(self, example: TaskExample) -> str:
        return " ".join(tag for tag in gold(example) if tag != "O") or "O"
