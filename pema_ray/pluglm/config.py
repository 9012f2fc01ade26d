"""Settings of PlugLM's jobs, typed: YAML in, frozen sections out. Knows pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.settings import Folder, Section
from pema_ray.training.config import TrainingConfig


class TextConfig(Section):
    """Texts in Parquet or JSON Lines, read by Ray Data."""

    files: tuple[str, ...] = ()
    """Files, folders or patterns (`corpus/*.parquet`), read in this order."""
    text_column: str = "text"
    """Column of the text, in JSON Lines and Parquet."""
    document_column: str | None = None
    """Column of the document's id; None: a hash of the text."""
    source_column: str | None = None
    """Column of the text's source, for reports; None: `source`."""
    source: str = ""
    """Source of all texts, without `source_column`."""

    @field_validator("files", mode="before")
    @classmethod
    def _is_a_list(cls, files: Any) -> Any:
        return (files,) if isinstance(files, str) else files


class ModelSettings(Section):
    """The encoder and its memory layers (`model.config.PlugLMConfig`)."""

    backbone: str | None = None
    """A BERT-family checkpoint, by hub name or folder; of a PlugLM folder, training continues with that model."""
    sizes: dict[str, Any] = {}
    """Config of a backbone with random weights instead: `model_type`, `hidden_size`, `num_hidden_layers`, …"""
    tokenizer: str | None = None
    """A tokenizer, by hub name or folder; None: the backbone's."""
    memory_layers: int = Field(default=1, ge=1)
    """M."""
    memory_feed_forward: int = Field(default=768, ge=0)
    """Width of the feed-forward network beside knowledge attention; 0: replaced by it."""
    knowledge_attention: Literal["multi_head", "sentence_level"] = "multi_head"
    """Per token, or one mixture of values for all tokens."""
    query_size: int = Field(default=128, ge=1)
    """d_q, the size of queries and keys."""
    query_norm: bool = True
    """BatchNorm on queries."""
    top_k: int = Field(default=5, ge=1)
    """k."""
    max_document_tokens: int = Field(default=288, ge=3)
    """Longer documents become several entries."""
    retrieval: Literal["inner_product", "cosine"] = "inner_product"
    """`inner_product` as published; `cosine` (a departure) is also the attention's bias."""
    value_pooler: bool = False
    """A separate pooler for values (a departure)."""
    exclude_own: bool = True
    """A text does not retrieve the document it was cut from (a departure: the published code allows it)."""

    @model_validator(mode="after")
    def _has_one_beginning(self) -> ModelSettings:
        if bool(self.backbone) == bool(self.sizes):
            raise ValueError("give either 'backbone' (a checkpoint) or 'sizes' (random weights)")
        if self.sizes and not self.tokenizer:
            raise ValueError("'sizes' needs a 'tokenizer'")
        return self

    @property
    def memory(self) -> dict[str, Any]:
        """The fields that `PlugLMConfig` has too."""
        return self.model_dump(exclude={"backbone", "sizes", "tokenizer"})


class MemoryActors(Section):
    """Actors that search and refresh a memory; they never change a result."""

    shards: int = Field(default=1, ge=1)
    """Actors that load and search it."""
    cpus_per_shard: float = Field(default=1, ge=0)
    """CPUs that each asks of Ray."""
    refresh_workers: int = Field(default=1, ge=0)
    """Actors that encode it again, by Ray Data; 0: the leading training process does it."""
    cpus_per_refresh_worker: float = Field(default=1, gt=0)
    """CPUs that each asks of Ray."""

    @property
    def cpus(self) -> float:
        """CPUs of all actors."""
        return self.shards * self.cpus_per_shard + self.refresh_workers * self.cpus_per_refresh_worker


class MemorySettings(MemoryActors):
    """The knowledge memory of a training: how it is stored and searched."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Number format of keys and values."""
    entries_per_segment: int = Field(default=4096, ge=1)
    """Entries in a file: the unit of refreshing."""


class MemoryTrainingConfig(TrainingConfig):
    """Settings of pre-training and fine-tuning."""

    batch_size: int = Field(default=32, ge=1)
    """Sequences per step, over all workers."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """At the end of the warm-up (`warm_up_steps`)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    schedule: Literal["polynomial", "cosine", "inverse_sqrt", "constant"] = "polynomial"
    """How the learning rate falls after the warm-up."""
    power: float = Field(default=1.0, gt=0)
    """Power of the `polynomial` schedule; 1: a straight line to zero."""
    refresh_every: int = Field(default=200, ge=1)
    """Steps between two encodings of the whole memory; fine-tuning adds one at the end of every epoch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the forward passes; weights and the optimiser stay float32."""

    @model_validator(mode="after")
    def _can_be_shared(self) -> MemoryTrainingConfig:
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {self.workers} workers in {self.accumulate} parts"
            )
        return self


class PretrainSettings(MemoryTrainingConfig):
    """Masked language modelling with a memory (published settings: configs/pluglm/published.yaml)."""

    steps: int = Field(default=8000, ge=1)
    """Optimisation steps."""
    batch_size: int = Field(default=256, ge=1)
    """Sequences per step, over all workers."""
    max_tokens: int = Field(default=128, ge=3)
    """Longest sequence; longer texts are cut into several."""
    optimizer: Literal["lamb", "adamw"] = "adamw"
    """`lamb` for very large batches, as published; not with deepspeed, which cuts tensors up."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """At the end of the warm-up (`warm_up_steps`)."""
    power: float = Field(default=0.5, gt=0)
    """Power of the `polynomial` schedule; published .5."""
    masking: Literal["static", "dynamic"] = "dynamic"
    """`static`: the same tokens of a sequence are masked in every epoch."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of a sequence's tokens to be predicted."""
    contrastive_steps: int = Field(default=0, ge=0)
    """First steps, in which queries learn to find their own document's key (a departure)."""
    contrastive_weight: float = Field(default=1.0, gt=0)
    """Weight of the contrastive loss."""
    contrastive_temperature: float = Field(default=1.0, gt=0)
    """Scores are q · key / (temperature · √d_q), or cos / temperature."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two checkpoints."""
    validate_every: int = Field(default=200, ge=1)
    """Steps between two validations, with the first 1,024 sequences of `validation`."""

    @model_validator(mode="after")
    def _fits_together(self) -> PretrainSettings:
        if self.optimizer == "lamb" and self.strategy == "deepspeed":
            raise ValueError("lamb needs whole tensors, deepspeed cuts them up: use ddp or accelerate, or adamw")
        return self


class PretrainConfig(Section):
    """One pre-training run."""

    run_dir: Folder = "runs/pluglm"
    """The run folder, for the results of all stages."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw: weights, masks, batches, dropout."""
    ray: RayConfig = RayConfig()
    model: ModelSettings
    documents: TextConfig
    """Texts of the memory."""
    text: TextConfig
    """Training texts."""
    validation: TextConfig | None = None
    """Validation texts."""
    memory: MemorySettings = MemorySettings()
    train: PretrainSettings = PretrainSettings()
