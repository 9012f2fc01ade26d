"""Cloze questions (LAMA): the word at [MASK], by the masked-language-model head. Scored by P@1."""

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
from pema_ray.pluglm.tasks.task import Feature, FinetuningTask


class Cloze(FinetuningTask):
    """Answers of one token, as in LAMA; longer answers count as wrong for every model, and are not learned."""

    kind: ClassVar[str] = "cloze"
    main = "p@1"

    def __init__(self) -> None:
        self._tokenizer: Any = None

    def model_class(self) -> Any:
        from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM

        return PlugLMForMaskedLM

    def read(self, path: Path) -> list[TaskExample]:
        return read_lama(path)

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        self._tokenizer = tokenizer
        texts = [example.text.replace("[MASK]", tokenizer.mask_token) for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
        features = []
        for number, (example, token_ids) in enumerate(zip(examples, encoded)):
            if tokenizer.mask_token_id not in token_ids:
                raise UserError(f"Sentence {example.id}: its [MASK] lies beyond max_tokens={max_tokens}.")
            mask_place = token_ids.index(tokenizer.mask_token_id)
            spans = tuple((0, 0) if place == mask_place else None for place in range(len(token_ids)))
            target = self._token(example.label)
            features.append(Feature(number, token_ids, [0] * len(token_ids), {"labels": target}, spans))
        return features

    def _token(self, word: str) -> int:
        """A word's token after a blank; -100 if it is several tokens, or unknown."""
        for text in (f" {word}", word):
            token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(token_ids) == 1 and token_ids[0] != self._tokenizer.unk_token_id:
                return token_ids[0]
        return IGNORED

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        labels = torch.full((len(features), length), IGNORED)
        for row, feature in enumerate(features):
            labels[row, _mask_place(feature)] = feature.targets["labels"]
        return {"labels": labels}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        best = [output.logits[row, _mask_place(feature)].argmax().item() for row, feature in enumerate(features)]
        return [self._tokenizer.decode([token]).strip() for token in best]

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        correct = [answers[example.id] == self._decodable(gold(example)) for example in examples]
        return {"p@1": sum(correct) / len(correct)}

    def _decodable(self, word: str) -> str | None:
        """A gold answer in the form that `decode` gives; None: it cannot give it."""
        token = self._token(word)
        return None if token == IGNORED else self._tokenizer.decode([token]).strip()


def _mask_place(feature: Feature) -> int:
    return next(place for place, span in enumerate(feature.spans) if span is not None)
