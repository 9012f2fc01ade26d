"""PlugLM's stages."""

from __future__ import annotations

from pema_ray.experiment.method import Method, Stage
from pema_ray.pluglm.config import PretrainConfig
from pema_ray.pluglm.finetune_config import FinetuneConfig

PLUGLM = Method(
    prefix="pema-ray pluglm",
    config=PretrainConfig,
    example="configs/pluglm/small.yaml",
    stages={
        "pretrain": Stage(
            "Masked language modelling with a memory that is refreshed every n steps, by Ray Train. Resumes.",
            "pema_ray.pluglm.stages.pretrain",
            reads=("model", "documents", "text", "validation", "memory", "train", "ray"),
            depends_on=("model", "train", "memory.dtype", "memory.entries_per_segment"),
            evidence=("model/config.json",),
        ),
        "finetune": Stage(
            "Fine-tune for a task with a frozen or a learned memory, by Ray Train; scores, answers, retrieved entries.",
            "pema_ray.pluglm.stages.finetune",
            reads=("model", "task", "data", "memory", "train", "ray"),
            depends_on=("task", "data", "memory", "train"),
            evidence=("model/config.json",),
            config=FinetuneConfig,
            example="configs/pluglm/classify.yaml",
        ),
    },
)
