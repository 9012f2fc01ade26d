"""The results of an evaluation, typed: the contract between the stage `evaluate` and the report.

Knows pydantic and nothing else: no model, no Ray, no plot. Everything is JSON (`model_dump_json`,
`model_validate_json`), so a report can be drawn again without measuring again. λ is `lam` in code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from pema_ray.runtime.settings import Section


class Result(Section):
    # A diverged run has NaN losses. JSON has no NaN: they are written as strings and read as floats.
    model_config = ConfigDict(ser_json_inf_nan="strings")


class TokenShare(Result):
    """One token of an answer, and its probability under each owner's distribution."""

    text: str
    lam: float = Field(ge=0, le=1)
    """λ_t, the weight of PEMA's distribution at this step."""
    p_pema: float = Field(ge=0)
    p_plm: float = Field(ge=0)

    @property
    def share(self) -> float:
        """PEMA's part of the token's probability, `λ p_pema / (λ p_pema + (1-λ) p_plm)`; 0.5 if both are zero."""
        pema, plm = self.lam * self.p_pema, (1 - self.lam) * self.p_plm
        return pema / (pema + plm) if pema + plm > 0 else 0.5


class Example(Result):
    """One test pair with the PLM's answer and PEMA's, the latter token by token."""

    example_id: int
    source: str
    reference: str
    plm_alone: str
    pema: str
    """The answer after post-processing."""
    tokens: tuple[TokenShare, ...] = ()
    """PEMA's answer as it was decoded, before post-processing."""


class SystemScore(Result):
    """One system's scores on the test split."""

    name: str
    kind: Literal["plm", "few_shot", "copy", "pema"]
    configured: bool = False
    """Whether it has the experiment's own `generate` settings."""
    lambda_max: float | None = None
    schedule: str | None = None
    bleu: float
    chrf: float
    archaic_share: float | None = None
    """Share (0 to 1) of outputs that match the task's archaic pattern; none where the task has no pattern."""
    archaic_count: int | None = None
    examples: int
    seconds: float | None = None
    mean_words: float


class LambdaSweep(Result):
    """NLL of the mixture at each constant λ, in nats per target token, teacher-forced; EOS is counted separately."""

    lambdas: tuple[float, ...]
    nll: tuple[float, ...]
    plm: float
    pema: float
    eos_plm: float
    eos_pema: float
    rows: int

    @model_validator(mode="after")
    def _one_nll_per_lambda(self) -> LambdaSweep:
        if len(self.lambdas) != len(self.nll):
            raise ValueError(f"{len(self.lambdas)} values of λ but {len(self.nll)} of NLL")
        return self


class TrainingPoint(Result):
    """Losses at one optimisation step: `loss = κ reconstruction + (1-κ) prediction`."""

    step: int
    loss: float
    reconstruction: float
    prediction: float


class TrainingHistory(Result):
    """How the adapter was trained."""

    train: tuple[TrainingPoint, ...]
    validation: tuple[TrainingPoint, ...]
    best_step: int
    reconstruction_error: float | None = None
    """Dev reconstruction error after stage 1; none where stage 1 was skipped."""
    seconds: float
    rank: int
    space: str
    kappa: float


class StageFigures(Result):
    """One stage of the experiment: its duration and its summary."""

    stage: str
    seconds: float
    summary: str


class Evaluation(Result):
    """Everything the report shows."""

    task: str
    description: str
    plm_name: str
    fingerprint: str
    pairs: dict[str, int]
    """Split -> pairs of texts."""
    rows: dict[str, int]
    """Split -> rows of external memory."""
    bleu_signature: str
    chrf_signature: str
    systems: tuple[SystemScore, ...]
    sweep: LambdaSweep
    training: TrainingHistory
    source_archaic_share: float | None = None
    reference_archaic_share: float | None = None
    lambda_curves: dict[str, tuple[float, ...]] = {}
    """Name of a schedule -> λ at answer positions 0, 1, 2, …"""
    examples: tuple[Example, ...] = ()
    stages: tuple[StageFigures, ...] = ()
