"""Scores of answers against references: sacreBLEU, chrF, and the share of archaic answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF


@dataclass(frozen=True, slots=True)
class Scores:
    """Corpus scores: BLEU and chrF in [0, 100]; archaic figures are None where the task names no pattern."""

    bleu: float
    chrf: float
    archaic_count: int | None
    archaic_share: float | None
    mean_words: float


class Scorer:
    """Scores systems on one test set.

    Args:
        references: one per answer.
        archaic_pattern: a regular expression that matches the old style.
    """

    def __init__(self, references: Sequence[str], language: str = "en", archaic_pattern: str | None = None) -> None:
        self.references = list(references)
        self.bleu, self.chrf = BLEU(trg_lang=language), CHRF()
        self._pattern = re.compile(archaic_pattern) if archaic_pattern else None

    def score(self, answers: Sequence[str]) -> Scores:
        """Raises ValueError unless there is one answer per reference."""
        if len(answers) != len(self.references):
            raise ValueError(f"{len(answers)} answers for {len(self.references)} references")
        count = self.archaic_count(answers)
        return Scores(
            bleu=self.bleu.corpus_score(answers, [self.references]).score,
            chrf=self.chrf.corpus_score(answers, [self.references]).score,
            archaic_count=count,
            archaic_share=None if count is None else count / len(answers),
            mean_words=sum(len(answer.split()) for answer in answers) / len(answers),
        )

    def archaic_count(self, texts: Sequence[str]) -> int | None:
        return None if self._pattern is None else sum(bool(self._pattern.search(text)) for text in texts)

    @property
    def signatures(self) -> tuple[str, str]:
        """sacreBLEU's signatures of BLEU and chrF; known after the first `score`."""
        return str(self.bleu.get_signature()), str(self.chrf.get_signature())
