"""Scores are sacreBLEU's own, with their signatures, and archaic answers are counted once each."""

from __future__ import annotations

import pytest
import sacrebleu

from pema_ray.evaluation.scores import Scorer

REFERENCES = [
    "He said to them, Go and tell the people what you have seen.",
    "You shall not steal.",
    "In the beginning, God created the heavens and the earth.",
]
ANSWERS = [
    "And he said unto them, Go and tell the people what ye have seen.",
    "Thou shalt not steal.",
    "In the beginning God created the heavens and the earth.",
]
ARCHAIC = r"\b(ye|thou|unto|shalt)\b"


@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_bleu_and_chrf_are_sacrebleus(language: str):
    scorer = Scorer(REFERENCES, language)
    scores = scorer.score(ANSWERS)
    tokenize = "zh" if language == "zh" else "13a"
    assert scores.bleu == sacrebleu.corpus_bleu(ANSWERS, [REFERENCES], tokenize=tokenize).score
    assert scores.chrf == sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score
    assert f"tok:{tokenize}" in scorer.signatures[0]


def test_perfect_answers_score_100():
    scores = Scorer(REFERENCES).score(REFERENCES)
    assert scores.bleu == pytest.approx(100) and scores.chrf == pytest.approx(100)


def test_an_archaic_answer_is_counted_once_however_many_old_words_it_has():
    scores = Scorer(REFERENCES, archaic_pattern="(?i)" + ARCHAIC).score(ANSWERS)
    assert (scores.archaic_count, scores.archaic_share) == (2, pytest.approx(2 / 3))
    assert Scorer(REFERENCES, archaic_pattern=ARCHAIC).archaic_count(ANSWERS + ["Yet youth"]) == 2
    assert scores.mean_words == pytest.approx((14 + 4 + 10) / 3)


def test_without_a_pattern_there_is_no_archaic_figure():
    scores = Scorer(REFERENCES).score(ANSWERS)
    assert scores.archaic_count is None and scores.archaic_share is None


def test_the_signatures_name_metric_settings_and_version():
    scorer = Scorer(REFERENCES)
    scorer.score(ANSWERS)
    bleu, chrf = scorer.signatures
    assert bleu == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert chrf == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"


@pytest.mark.parametrize("count", [0, 2, 4])
def test_one_answer_per_reference_is_required(count: int):
    with pytest.raises(ValueError, match=f"{count} answers for 3 references"):
        Scorer(REFERENCES).score((ANSWERS * 2)[:count])
