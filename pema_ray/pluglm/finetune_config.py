"""Settings of fine-tuning, typed (`pema_ray.experiment.configuration.read_config`). Knows pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.settings import Folder, Section
from pema_ray.training.config import TrainingConfig


class TaskSettings(Section):
    """What is learned, and how its files are read."""

    kind: Literal["classification", "regression", "tokens", "answers", "yes_no", "factoid", "cloze"]
    """`classification`, `regression`: tables as GLUE's; `tokens`: CoNLL; `answers`: SQuAD; `yes_no`, `factoid`: BioASQ;
    `cloze`: LAMA."""
    text_column: str = "sentence"
    """Column of the text, or of the first of two."""
    pair_column: str | None = None
    """Column of a second text, in tables."""
    label_column: str = "label"
    """Column of the answer."""
    header: bool = True
    """Whether .tsv and .csv name their columns; otherwise they are "0", "1", …"""
    metric: str | None = None
    """Of tables, as `evaluate` names it: accuracy, f1, matthews_correlation, pearson, glue/mrpc, …"""
    stride: int = Field(default=64, ge=0)
    """Tokens that two windows of a long passage share."""
    longest_answer: int = Field(default=30, ge=1)
    """Longest answer, in tokens."""


class TaskFiles(Section):
    """Paths of the examples."""

    train: str | None = None
    """None: nothing is learned, the model is scored as it is (cloze alone)."""
    validation: str
    """What is scored after every epoch; the best epoch's model is kept."""
    test: str | None = None
    """What is scored once, by the kept model."""


class TaskMemory(Section):
    """What the model reads while it learns, copied to `run_dir/finetune/memory`."""

    folder: str | None = None
    """A knowledge memory; none: only the training examples, or nothing."""
    version: int | None = None
    """Version of the memory; by default the current one."""
    in_task: bool = False
    """Training examples become entries (`text label`, tag `in-task`), which they do not retrieve themselves."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Number format of a memory of training examples alone."""
    shards: int = Field(default=0, ge=0)
    """Actors that hold it; 0: every training process holds all of it."""
    cpus_per_shard: float = Field(default=1, ge=0)
    """CPUs that each asks of Ray."""
    refresh_workers: int = Field(default=0, ge=0)
    """Actors that encode it anew where it is not frozen; 0: the leading training process does it."""
    cpus_per_refresh_worker: float = Field(default=1, gt=0)
    """CPUs that each asks of Ray."""


class FinetuneSettings(TrainingConfig):
    """How it is learned."""

    epochs: int = Field(default=3, ge=0)
    """0: the model is scored as it is."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences per step, over all workers."""
    max_tokens: int = Field(default=128, ge=8)
    """Longest input, in tokens."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """AdamW's, at the end of the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    schedule: Literal["polynomial", "cosine", "inverse_sqrt", "constant"] = "polynomial"
    """How the learning rate falls after the warm-up."""
    power: float = Field(default=1.0, gt=0)
    """Power of the `polynomial` schedule; 1: a straight line to zero."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; none leaves it as it is."""
    fix_keys: bool = True
    """Keys stay as stored; otherwise retrieved documents are encoded again, with gradients."""
    fix_values: bool = True
    """The same of values. With both, the memory is frozen; otherwise all of it is encoded anew every n steps."""
    refresh_every: int = Field(default=200, ge=1)
    """Steps between two encodings of a memory that is not frozen; also at the end of every epoch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the forward passes; weights and the optimiser stay float32."""

    @model_validator(mode="after")
    def _can_be_shared(self) -> FinetuneSettings:
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {self.workers} workers in {self.accumulate} parts"
            )
        return self

    @property
    def frozen(self) -> bool:
        return self.fix_keys and self.fix_values


class FinetuneConfig(Section):
    """One fine-tuning run."""

    run_dir: Folder = "runs/pluglm_task"
    """The run folder: what stages make lies there."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw: the head's weights, batches, dropout."""
    ray: RayConfig = RayConfig()
    model: str
    """Folder of a pre-trained PlugLM model."""
    task: TaskSettings
    data: TaskFiles
    memory: TaskMemory = TaskMemory()
    train: FinetuneSettings = FinetuneSettings()

    @model_validator(mode="after")
    def _has_something_to_do(self) -> FinetuneConfig:
        if self.data.train is None and (self.task.kind != "cloze" or self.memory.in_task):
            raise ValueError(f"'{self.task.kind}' needs data.train" if not self.memory.in_task else "in_task needs it")
        return self
