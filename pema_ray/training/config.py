"""Settings that every training has: workers, strategy, optimizer, schedule, checkpoints, trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pema_ray.runtime.settings import Section


class TrainingConfig(Section):
    """Settings common to trainings of any model: processes, gradients, trackers."""

    warm_up_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly from zero."""
    clip: float | None = Field(default=None, gt=0)
    """Maximum norm of the gradient; none: no clipping."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a worker computes its rows of a step: less memory, the same gradient."""
    strategy: Literal["ddp", "accelerate", "deepspeed"] = "ddp"
    """Library that exchanges gradients between workers."""
    zero_stage: Literal[1, 2] = 1
    """What deepspeed partitions over workers: optimiser state alone, or gradients too."""
    workers: int = Field(default=1, ge=1)
    """Training processes."""
    min_workers: int | None = Field(default=None, ge=1)
    """Minimum workers after node loss; more join, up to `workers`, as nodes join. None: always `workers`."""
    cpus_per_worker: float = Field(default=2, gt=0)
    """CPUs that one worker requests from Ray."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that one worker requests from Ray."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where the curves go: TensorBoard's files in the run's folder, MLflow, Weights & Biases."""
    resume: bool = True
    """Resume from a checkpoint of the same settings. A finished training is reused either way."""
    max_failures: int = Field(default=8, ge=-1)
    """Maximum number of worker deaths before training stops; -1: no limit."""
    storage_path: str | None = Field(default=None, min_length=1)
    """Where Ray Train keeps copies of checkpoints: a folder that all workers share, or a URI (`s3://bucket/folder`). A
    run whose folder has no checkpoint resumes from there. None: in the run's folder."""

    @model_validator(mode="after")
    def _has_room_to_shrink(self) -> TrainingConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not exceed workers ({self.workers})")
        return self
