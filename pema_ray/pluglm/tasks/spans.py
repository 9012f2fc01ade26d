"""Extractive question answering (SQuAD) and BioASQ's factoid questions: a span of a passage.

Long passages are cut into overlapping windows; position 0 means that a window holds no answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.pluglm.tasks.reading import TaskExample, read_bioasq, read_squad
from pema_ray.pluglm.tasks.scores import answer_scores, factoid_scores, normalized
from pema_ray.pluglm.tasks.task import Feature, FinetuningTask

_POSITIONS = 20  # best starts and best ends that are combined
_SPANS_PER_WINDOW = 10
_MAX_ANSWERS = 5  # of a factoid question


class Spans(FinetuningTask):
    """SQuAD 1.1 and 2.0.

    Args:
        stride: tokens that two windows share.
        longest: longest answer, in tokens.
        may_be_none: whether "no answer" is an answer, as in SQuAD 2.0; None: decided by the training examples.
    """

    kind: ClassVar[str] = "answers"
    main = "f1"

    def __init__(self, stride: int = 64, longest: int = 30, may_be_none: bool | None = None) -> None:
        self.stride, self.longest, self._may_be_none = stride, longest, may_be_none

    def model_class(self) -> Any:
        from pema_ray.pluglm.model.heads import PlugLMForQuestionAnswering

        return PlugLMForQuestionAnswering

    def read(self, path: Path) -> list[TaskExample]:
        return read_squad(path)

    def prepare(self, train: Sequence[TaskExample]) -> None:
        if self._may_be_none is None:  # SQuAD 2.0 has questions without answers
            self._may_be_none = any(not example.label for example in train)

    def features(self, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> list[Feature]:
        longest_question = max_tokens // 2
        questions = [_cut(example.text, tokenizer, longest_question) for example in examples]
        stride = min(self.stride, max(0, (max_tokens - longest_question) // 2 - 2))
        windows = tokenizer(
            questions, [example.pair for example in examples], truncation="only_second", max_length=max_tokens,
            stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
        )  # fmt: skip
        features = []
        for part, (number, types) in enumerate(zip(windows["overflow_to_sample_mapping"], windows["token_type_ids"])):
            text_ids, offsets = windows.sequence_ids(part), windows["offset_mapping"][part]
            spans = tuple(tuple(span) if text_id == 1 else None for text_id, span in zip(text_ids, offsets))
            target = self._target(examples[number], spans)
            features.append(Feature(number, windows["input_ids"][part], types, target, spans))
        return features

    def _target(self, example: TaskExample, spans: Sequence[tuple[int, int] | None]) -> dict[str, Any]:
        """The first gold answer's first and last token; 0, 0 if this window does not hold it."""
        if example.label is None:
            return {}
        no_answer = {"start_positions": 0, "end_positions": 0}
        if not example.starts:
            return no_answer
        begin = example.starts[0]
        end = begin + len(_gold_at(example))
        inside = [place for place, span in enumerate(spans) if span is not None and span[0] < end and span[1] > begin]
        if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:  # pyright: ignore[reportOptionalSubscript]
            return no_answer
        return {"start_positions": inside[0], "end_positions": inside[-1]}

    def collate(self, features: Sequence[Feature], length: int) -> dict[str, Tensor]:
        if any(not feature.targets for feature in features):
            return {}
        names = ("start_positions", "end_positions")
        return {name: torch.tensor([feature.targets[name] for feature in features]) for name in names}

    def decode(self, output: Any, features: Sequence[Feature], examples: Sequence[TaskExample]) -> list[Any]:
        """The best spans of each window: (score above "no answer", text)."""
        return [
            self._spans(start_T, end_T, feature, examples[feature.example].pair)
            for start_T, end_T, feature in zip(output.start_logits.cpu(), output.end_logits.cpu(), features)
        ]

    def _spans(self, start_T: Tensor, end_T: Tensor, feature: Feature, passage: str) -> list[tuple[float, str]]:
        no_answer = float(start_T[0] + end_T[0])
        outside_T = torch.tensor([span is None for span in feature.spans])
        T = len(outside_T)
        starts, ends = (
            logit_T[:T].masked_fill(outside_T, -torch.inf).topk(min(_POSITIONS, T)) for logit_T in (start_T, end_T)
        )
        spans = []
        for start, first in zip(starts.values.tolist(), starts.indices.tolist()):
            for end, last in zip(ends.values.tolist(), ends.indices.tolist()):
                begin, stop = feature.spans[first], feature.spans[last]
                if begin is not None and stop is not None and first <= last < first + self.longest:
                    spans.append((start + end - no_answer, passage[begin[0] : stop[1]]))
        return sorted(spans, key=lambda span: -span[0])[:_SPANS_PER_WINDOW]

    def answers(self, examples: Sequence[TaskExample], decoded: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        best: dict[str, tuple[float, str]] = {}
        for number, spans in decoded:
            for score, text in spans:
                group = examples[number].group
                if group not in best or score > best[group][0]:
                    best[group] = (score, text)
        threshold = 0.0 if self._may_be_none else float("-inf")
        return {group: text if score > threshold else "" for group, (score, text) in best.items()}

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        return answer_scores(answers, _golds(examples))

    def label_text(self, example: TaskExample) -> str:
        return _gold_at(example) if example.label else "no answer"


class Factoid(Spans):
    """BioASQ's factoid questions: up to five different answers, best first, from all snippets of a question."""

    kind: ClassVar[str] = "factoid"
    main = "mrr"

    def __init__(self, stride: int = 64, longest: int = 30) -> None:
        super().__init__(stride, longest, may_be_none=False)

    def read(self, path: Path) -> list[TaskExample]:
        return read_bioasq(path, "factoid")

    def answers(self, examples: Sequence[TaskExample], decoded: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        spans_of_groups: dict[str, list[tuple[float, str]]] = {}
        for number, spans in decoded:
            spans_of_groups.setdefault(examples[number].group, []).extend(tuple(span) for span in spans)
        answers: dict[str, list[str]] = {}
        for group, spans in spans_of_groups.items():
            distinct: dict[str, str] = {}
            for _, text in sorted(spans, key=lambda span: -span[0]):
                distinct.setdefault(normalized(text), text)
            answers[group] = list(distinct.values())[:_MAX_ANSWERS]
        return answers

    def scores(self, examples: Sequence[TaskExample], answers: Mapping[str, Any]) -> dict[str, float]:
        return factoid_scores(answers, _golds(examples))


def _golds(examples: Sequence[TaskExample]) -> dict[str, list[str]]:
    for example in examples:
        if example.label is None:
            raise UserError(f"Question {example.id} has no answers to score against.")
    return {example.group: example.label for example in examples}


def _gold_at(example: TaskExample) -> str:
    """The gold answer at the first of `starts`, as spelled in the passage; without `starts`, the first gold answer."""
    if not example.starts:
        return example.label[0] if example.label else ""
    patterns = (re.compile(re.escape(gold), re.IGNORECASE) for gold in example.label)
    return next(match.group() for pattern in patterns if (match := pattern.match(example.pair, example.starts[0])))


def _cut(text: str, tokenizer: Any, max_tokens: int) -> str:
    """A question's first `max_tokens` tokens, to leave room for its passage."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(spans) <= max_tokens else text[: spans[max_tokens - 1][1]]
