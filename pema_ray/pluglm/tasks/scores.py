"""Scores of tasks, under `evaluate`'s names. Mathematics: knows scikit-learn, scipy and seqeval.

`score("glue/mrpc", …)` gives all figures that GLUE reports of that task; `score("f1", …)` gives one. All are fractions
between 0 and 1 (correlations between -1 and 1), never percentages.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pema_ray.errors import UserError, nearest

Scores = dict[str, float]
GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""GLUE's metrics of each task."""


def _correlation(kind: str) -> Callable[[Any, Any], float]:
    def correlation(predictions: Any, references: Any) -> float:
        from scipy import stats

        if np.ptp(predictions) == 0 or np.ptp(references) == 0:  # undefined for a constant; GLUE counts it as 0
            return 0.0
        return float(getattr(stats, kind)(predictions, references).statistic)

    return correlation


def _sklearn(name: str, **options: Any) -> Callable[[Any, Any], float]:
    def metric(predictions: Any, references: Any) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(references, predictions, **options))

    return metric


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0),
    "macro_f1": _sklearn("f1_score", average="macro", zero_division=0),
    "micro_f1": _sklearn("f1_score", average="micro", zero_division=0),
    "matthews_correlation": _sklearn("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearmanr": _correlation("spearmanr"),
    "mse": _sklearn("mean_squared_error"),
}
"""Metrics of classes (`f1`: of class 1) or numbers, one for each example."""
ERRORS = frozenset({"mse"})
"""Metrics for which lower is better."""


def metric_names(name: str) -> tuple[str, ...]:
    """One metric, or all of a GLUE task (`glue/mrpc`). Raises `UserError` for an unknown name."""
    if name.startswith("glue/"):
        task = name.removeprefix("glue/")
        if task not in GLUE:
            raise UserError(f"Metric '{name}': GLUE has {', '.join(GLUE)}.{nearest(task, tuple(GLUE))}")
        return GLUE[task]
    if name not in METRICS:
        raise UserError(f"Metric '{name}': use {', '.join(METRICS)}, or glue/<task>.{nearest(name, tuple(METRICS))}")
    return (name,)


OF_NUMBERS = frozenset({"pearson", "spearmanr", "mse"})
"""Metrics of numbers; all others are of classes."""
OF_TWO_CLASSES = frozenset({"f1"})


def require_metric(name: str, classes: int | None) -> None:
    """Raises `UserError` if a metric does not fit a task of so many classes; None: a task of numbers."""
    of_numbers = classes is None
    for metric in metric_names(name):
        if of_numbers != (metric in OF_NUMBERS):
            choices = [choice for choice in METRICS if (choice in OF_NUMBERS) == of_numbers]
            kind = "numbers" if of_numbers else "classes"
            raise UserError(f"Metric '{name}': is not one of {kind}; use {', '.join(choices)}.")
        if metric in OF_TWO_CLASSES and classes != 2:
            raise UserError(
                f"Metric '{name}': '{metric}' is of two classes, and the training examples have {classes}. Use "
                "macro_f1, micro_f1 or accuracy."
            )


def score(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
    """Scores of predictions, one for each example."""
    return {metric: METRICS[metric](np.asarray(predictions), np.asarray(references)) for metric in metric_names(name)}


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Scores:
    """seqeval's precision, recall and F1 of whole entities (IOB2 and similar), and accuracy of tags."""
    from seqeval import metrics

    tags: tuple[Any, Any] = ([list(row) for row in references], [list(row) for row in predictions])
    scorers: dict[str, Any] = {  # typed too narrowly there
        "precision": metrics.precision_score, "recall": metrics.recall_score, "f1": metrics.f1_score,
    }  # fmt: skip
    scores = {name: float(scorer(*tags, zero_division=0)) for name, scorer in scorers.items()}
    return scores | {"accuracy": float(metrics.accuracy_score(*tags))}


# ── answers ─────────────────────────────────────────────────────────────────


def normalized(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """SQuAD's exact match and F1, the best over a question's gold answers; without any, the empty answer is correct."""
    exact, overlap = [], []
    for key, golds in references.items():
        answer = predictions.get(key, "")
        golds = [gold for gold in golds if normalized(gold)] or [""]
        exact.append(max(float(normalized(answer) == normalized(gold)) for gold in golds))
        overlap.append(max(_overlap(answer, gold) for gold in golds))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _overlap(answer: str, gold: str) -> float:
    """F1 of the words."""
    answer_words, gold_words = normalized(answer).split(), normalized(gold).split()
    if not answer_words or not gold_words:
        return float(answer_words == gold_words)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def factoid_scores(predictions: Mapping[str, Sequence[str]], references: Mapping[str, Sequence[str]]) -> Scores:
    """BioASQ's: strict and lenient accuracy (the first is correct; one of the first five), and mean reciprocal rank."""
    ranks = []
    for key, synonyms in references.items():
        golds = {normalized(synonym) for synonym in synonyms}
        answers = [normalized(answer) for answer in predictions.get(key, ())][:5]
        ranks.append(next((rank for rank, answer in enumerate(answers, 1) if answer in golds), 0))
    rank = np.array(ranks, float)
    return {
        "strict_accuracy": float((rank == 1).mean()),
        "lenient_accuracy": float((rank > 0).mean()),
        "mrr": float(np.divide(1.0, rank, out=np.zeros_like(rank), where=rank > 0).mean()),
    }


def yes_no_scores(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    """BioASQ's: accuracy, F1 of "yes" and of "no", and their mean; 1 is yes."""
    from sklearn import metrics

    f1_score: Any = metrics.f1_score  # typed too narrowly there
    yes, no = (float(f1_score(references, predictions, pos_label=label, zero_division=0)) for label in (1, 0))
    accuracy = METRICS["accuracy"](predictions, references)
    return {"accuracy": accuracy, "f1_yes": yes, "f1_no": no, "macro_f1": (yes + no) / 2}
