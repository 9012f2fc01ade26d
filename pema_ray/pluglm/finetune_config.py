"""Settings of fine-tuning, typed (`pema_ray.experiment.configuration.read_config`). Knows pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pema_ray.pluglm.config import MemoryActors, MemoryTrainingConfig
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.settings import Folder, Section


class TaskSettings(Section):
    """The task, and the format of its files."""

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
    """Metric of tables, as `evaluate` names it: accuracy, f1, matthews_correlation, pearson, glue/mrpc, …"""
    stride: int = Field(default=64, ge=0)
    """Tokens that two windows of a long passage share."""
    longest_answer: int = Field(default=30, ge=1)
    """Longest answer, in tokens."""


class TaskFiles(Section):
    """Paths of the examples."""

    train: str | None = None
    """Training examples; None: score the model without training (cloze alone)."""
    validation: str
    """Examples scored after every epoch; the best epoch's model is kept."""
    test: str | None = None
    """Examples scored once, by the kept model."""


class TaskMemory(MemoryActors):
    """The model's memory, copied to `run_dir/finetune/memory`."""

    folder: str | None = None
    """A knowledge memory; None: only the training examples, or no memory."""
    version: int | None = None
    """Version of the memory; by default the current one."""
    in_task: bool = False
    """Training examples become entries (`text label`, tag `in-task`); no example retrieves itself."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Number format of a memory of training examples alone."""
    shards: int = Field(default=0, ge=0)
    """Actors that load and search it; 0: every training process loads all of it."""
    refresh_workers: int = Field(default=0, ge=0)
    """Actors that encode it again, unless it is frozen; 0: the leading training process does it."""


class FinetuneSettings(MemoryTrainingConfig):
    """The training."""

    epochs: int = Field(default=3, ge=0)
    """0: score the model without training."""
    max_tokens: int = Field(default=128, ge=8)
    """Longest input, in tokens."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; None: no clipping."""
    fix_keys: bool = True
    """Use keys as stored; otherwise retrieved documents are encoded again, with gradients."""
    fix_values: bool = True
    """The same for values. With both, the memory is frozen; otherwise it is refreshed every `refresh_every` steps."""

    @property
    def frozen(self) -> bool:
        return self.fix_keys and self.fix_values


class FinetuneConfig(Section):
    """One fine-tuning run."""

    run_dir: Folder = "runs/pluglm_task"
    """The run folder, for the results of all stages."""
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
