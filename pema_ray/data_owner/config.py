"""Settings of decoding: Gradual Unrolling, sampling, beams, kNN-LM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pema_ray.runtime.settings import Section, Split

ScheduleKind = Literal["constant", "linear", "quadratic"]
"""How λ falls (see `decoding/unrolling.py`); API, playground and report offer these choices."""


class KnnConfig(Section):
    """How kNN-LM searches the training memory."""

    neighbours: int = Field(default=32, ge=1)
    """k, the rows returned for a state."""
    index: Literal["flat", "inverted"] = "flat"
    """`flat` compares with every row, `inverted` with those of the nearest lists."""
    probes: int = Field(default=16, ge=1)
    """Lists that `inverted` searches."""


class KnnMixConfig(KnnConfig):
    """kNN-LM over the training memory, mixed into the adapter's distribution."""

    weight: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the neighbours in the data owner's distribution; 0 skips the search."""
    temperature: float = Field(default=100.0, gt=0)
    """In squared distance after the PLM's final norm."""


class UnrollingConfig(Section):
    """λ of Gradual Unrolling (paper section 3.4): the one declaration for stages and services."""

    lambda_max: float = Field(default=0.9, ge=0, le=1)
    """λ of the first token: 0 is the PLM alone, 1 (constant) the adapter alone."""
    schedule: ScheduleKind = "constant"
    """λ after the first token."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Lowest λ of a falling schedule."""


class GenerateConfig(UnrollingConfig):
    """Gradual Unrolling (paper section 3.4) and the decoding loop."""

    split: Split = "test"
    """Which pairs to answer."""
    length: Literal["prompt", "source", "reference"] | int = "source"
    """Length over which a falling schedule falls; `reference` is an oracle, to reproduce published figures."""
    knn: KnnMixConfig = KnnMixConfig()
    """Neighbours from the training memory, beside the adapter."""
    decoding: Literal["greedy", "sample", "beam"] = "greedy"
    """How the next token is chosen from the mixture."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of the probability that sampling draws from."""
    beams: int = Field(default=4, ge=1)
    """Hypotheses of beam search."""
    length_penalty: float = 1.0
    """Finished beams are ranked by log P / tokens^length_penalty."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside the task's."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum tokens of an answer."""
    max_new_ratio: float = Field(default=2.5, gt=0)
    """Maximum answer length: this × source tokens + 16."""
    draft: int = Field(default=0, ge=0, le=16)
    """Maximum draft tokens per step, taken from the prompt and verified in one pass; 0 drafts none. Answers stay the
    same, except for near ties in 16-bit formats."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences decoded together by one actor; every beam is one."""
    actors: int = Field(default=1, ge=1)
    """Generating actors; `evaluate` uses them too."""
    cpus_per_actor: float = Field(default=2, gt=0)
    """CPUs that one actor asks of Ray."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that one actor asks of Ray."""
