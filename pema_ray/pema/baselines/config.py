"""Settings of PEMA's peers."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from pema_ray.data_owner.config import KnnConfig
from pema_ray.runtime.settings import Section, Share


class LoraSettings(Section):
    """Of the low-rank updates, on every linear layer but the LM head."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the updates."""
    alpha: int = Field(default=32, ge=1)
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what the updates read, in training."""
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(2e-4, 5e-4), min_length=1)
    """Learning rates to try, of AdamW: after a warm-up of a twentieth of the steps, falling to zero as a cosine.
    The rate and the epoch with the lowest loss on the dev pairs are kept."""
    epochs: int = Field(default=2, ge=1)
    """Epochs, at most."""
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Most token positions of a step, padding included."""


class KnnSettings(KnnConfig):
    """Of kNN-LM; temperature and λ are those with the lowest NLL on the dev memory."""

    temperatures: tuple[PositiveFloat, ...] = Field(default=(10.0, 30.0, 100.0, 300.0), min_length=1)
    """Temperatures to try, in squared distance after the PLM's final norm."""
    lambdas: tuple[Share, ...] = Field(default=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), min_length=1)
    """λ to try, the weight of the neighbours."""


class SmallLMSettings(Section):
    """Of the small language models of `memory_decoder` and `proxy_tuning`: a Llama over the LM head's rows."""

    layers: int = Field(default=2, ge=1)
    """Layers of each small model."""
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(3e-4, 1e-3), min_length=1)
    """Learning rates to try, of AdamW, in one cycle. The rate and the epoch with the lowest loss on the dev pairs
    are kept."""
    epochs: int = Field(default=4, ge=1)
    """Epochs, at most."""
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Most token positions of a step, padding included."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the neighbours' distribution in what `memory_decoder` learns; the rest is the target itself."""
    neighbours: int = Field(default=32, ge=1)
    """k of the neighbours' distribution that `memory_decoder` learns."""
    temperature: float = Field(default=100.0, gt=0)
    """Temperature of the neighbours' distribution that `memory_decoder` learns, in squared distance after the PLM's
    final norm."""
    alphas: tuple[PositiveFloat, ...] = Field(default=(0.25, 0.5, 0.75, 1.0, 1.5), min_length=1)
    """How far `proxy_tuning` shifts the PLM's logits: to try, by NLL on the dev pairs."""
