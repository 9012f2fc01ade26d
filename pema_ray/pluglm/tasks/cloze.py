"""Cloze questions (LAMA): the word behind [MASK], by the masked-language-model head. Scored by P@1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.tasks.reading import TaskExample, read_lama
from pema_ray.pluglm.tasks.sequences import gold
from pema_ray.pluglm.tasks.task import Feature


class Cloze:
    """Answers of one token of the vocabulary, as LAMA asks; others count as wrong, for every model alike, and nothing
    is learned from them.
    """

    kind: ClassVar[str] = "cloze"
    main = "p@1"

    def __init__(self) -> None:
        self._tokenizer: Any = None

    def model_class(self) -> Any:
        from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM

        return PlugLMForMaskedLM

    def head(self) -> dict[str, Any]:
        return {}

    def read(self, path: Path) -> list[TaskExample]:
        return read_lama(path)

    def prepare(self, train: Sequence[TaskExample]) -> None:
        pass

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        self._tokenizer = tokenizer
        texts = [example.text.replace("[MASK]", tokenizer.mask_token) for example in examples]
        found = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        features = []
        for number, (example, token_ids) in enumerate(zip(examples, found)):
            if tokenizer.mask_token_id not in token_ids:
                raise UserError(f"Sentence {example.id}: its [MASK] lies beyond max_tokens={max_tokens}.")
            place = token_ids.index(tokenizer.mask_token_id)
            spans = tuple((0, 0) if one == place else None for one in range(len(token_ids)))
            target = self._token(example.label)
            features.append(Feature(number, token_ids, [0] * len(token_ids), {"labels": target}, spans))
        return features

    def _token(self, word: str) -> int:
        """The one token of a word, as it stands after a blank; -100 where it is several, or unknown."""
        for text in (f" {word}", word):
            token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(token_ids) == 1 and token_ids[0] != self._tokenizer.unk_token_id:
                return token_ids[0]
        return IGNORED

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        labels = torch.full((len(features), length), IGNORED)
        for row, one in enumerate(features):
            labels[row, _masked(one)] = one.targets["labels"]
        return {"labels": labels}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        best = [output.logits[row, _masked(one)].argmax().item() for row, one in enumerate(features)]
        return [self._tokenizer.decode([token]).strip() for token in best]

    def answers(self, examples: Sequence[TaskExample], said: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        return {examples[number].id: answer for number, answer in said}

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        right = [answers[example.id] == self._said(gold(example)) for example in examples]
        return {"p@1": sum(right) / len(right)}

    def _said(self, word: str) -> str | None:
        """A gold answer as `decode` would say it; None: it never could."""
        token = self._token(word)
        return None if token == IGNORED else self._tokenizer.decode([token]).strip()

    def label_text(self, example: TaskExample) -> str:
        return str(example.label)


def _masked(feature: Feature) -> int:
    return next(place for place, span in enumerate(feature.spans) if span is not None)
