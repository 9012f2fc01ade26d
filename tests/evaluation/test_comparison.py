"""A comparison says how sure its differences are, and shows every seed's spread."""

from __future__ import annotations

import random

import pytest

from pema_ray.evaluation.comparison import Comparison, Measurement, Peer, markdown, significance
from pema_ray.evaluation.scores import Scorer

WORDS = ["the", "house", "is", "old", "and", "garden", "was", "large", "with", "many", "people", "near", "river"]


def spoiled(texts: list[str], share: float, seed: int) -> list[str]:
    """The texts with some of their words replaced."""
    draw = random.Random(seed)
    return [" ".join("word" if draw.random() < share else word for word in text.split()) for text in texts]


@pytest.fixture(scope="module")
def references() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(120)]


def test_a_clear_difference_is_significant_and_chance_is_not(references):
    answers = {
        "better": spoiled(references, 0.1, 1),
        "reference": spoiled(references, 0.3, 2),
        "alike": spoiled(references, 0.3, 3),
        "the same": spoiled(references, 0.3, 2),
    }
    scorer = Scorer(references)
    results = significance(scorer, answers, "reference", 300)
    assert set(results) == set(answers)
    assert results["reference"].bleu_p is None and results["reference"].chrf_p is None
    assert results["better"].bleu_p < 0.01 and results["better"].chrf_p < 0.01
    assert results["alike"].bleu_p > 0.05 and results["the same"].bleu_p > 0.9
    for name, texts in answers.items():
        assert results[name].bleu_low < scorer.score(texts).bleu < results[name].bleu_high
    assert results == significance(scorer, answers, "reference", 300)  # its draws are seeded


def test_the_table_shows_means_and_deviations_over_seeds_and_what_was_chosen():
    seeds = [
        Measurement(seed=n, nll=1.5 + 0.1 * n, bleu=30.0 + n, chrf=50.0, line_bytes=2**21, note="λ 0.8, chosen on dev")
        for n in range(3)
    ]
    peers = (
        Peer(name="PEMA (residual)", given="LM head", measurements=tuple(seeds)),
        Peer(name="copy", given="nothing", measurements=(Measurement(seed=0, bleu=6.9, chrf=20.0),)),
    )
    comparison = Comparison(
        task="t", plm_name="p", train_pairs=2000, test_pairs=500, decoding="greedy", bleu_signature="s", peers=peers
    )
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in markdown(comparison).splitlines()}
    pema, copied = rows["PEMA (residual)"], rows["copy"]
    assert pema[2:5] == ["3", "1.600 ± 0.100", "31.0 ± 1.0"] and pema[-1] == "2.0 MiB |"
    assert copied[2:5] == ["1", "", "6.9"]
    assert "- PEMA (residual), seed 2: λ 0.8, chosen on dev" in markdown(comparison)
    assert peers[0].bleu == 31.0 and peers[1].deviation("bleu") is None
