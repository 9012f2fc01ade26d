"""Scores against figures calculated by hand."""

from __future__ import annotations

import pytest

from pema_ray.errors import UserError
from pema_ray.pluglm.tasks.scores import (
    answer_scores,
    entity_scores,
    factoid_scores,
    metric_names,
    normalized,
    score,
    yes_no_scores,
)


def test_glue_names_ask_for_what_glue_reports() -> None:
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    assert score("glue/mrpc", predictions, references) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    # (TP·TN - FP·FN) / √(…) = (2·1 - 1·1) / √(3·3·2·2)
    assert score("glue/cola", predictions, references) == pytest.approx({"matthews_correlation": 1 / 6})
    assert score("glue/stsb", [1.0, 2.0, 3.0], [2.0, 4.0, 9.0]) == pytest.approx(
        {"pearson": 0.9707, "spearmanr": 1.0}, abs=1e-4
    )
    assert score("pearson", [1.0, 1.0], [0.0, 2.0]) == {"pearson": 0.0}
    assert metric_names("glue/mnli") == ("accuracy",)
    for name, message in (("glue/mrcp", "Did you mean 'mrpc'"), ("acuracy", "Did you mean 'accuracy'")):
        with pytest.raises(UserError, match=message):
            metric_names(name)


def test_entities_are_counted_whole() -> None:
    references = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    predictions = [["B-A", "O", "O", "B-B"], ["O", "B-A"]]  # one of three entities is cut short
    assert entity_scores(predictions, references) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "accuracy": 5 / 6}
    )


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("The  Cat, a hat!") == "cat hat"
    scores = answer_scores(
        {"1": "the red cat", "2": "", "3": "dog"}, {"1": ["A red cat!", "cat"], "2": [], "3": ["big dog"], "4": ["x"]}
    )
    assert scores == pytest.approx({"exact_match": 0.5, "f1": (1 + 1 + 2 / 3 + 0) / 4})


def test_factoids_are_ranked() -> None:
    scores = factoid_scores(
        {"1": ["BRCA1"], "2": ["x", "y", "The p53"], "3": ["a1", "b", "c", "d", "e", "right"]},
        {"1": ["brca1", "BRCA-1"], "2": ["p53"], "3": ["right"]},
    )
    assert scores == pytest.approx({"strict_accuracy": 1 / 3, "lenient_accuracy": 2 / 3, "mrr": (1 + 1 / 3) / 3})


def test_yes_and_no_count_alike() -> None:
    assert yes_no_scores([1, 1, 1, 1], [1, 1, 1, 0]) == pytest.approx(
        {"accuracy": 0.75, "f1_yes": 6 / 7, "f1_no": 0.0, "macro_f1": 3 / 7}
    )
