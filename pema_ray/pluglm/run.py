"""The run folders of PlugLM's trainings: the inputs that a result depends on. Knows no model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.experiment.stage_run import HOW_FAST, StageRun
from pema_ray.pluglm.config import PretrainConfig
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.learning.text import content_hash
from pema_ray.pluglm.memory import versions
from pema_ray.pluglm.method import PLUGLM


class PluglmRun(StageRun[PretrainConfig | FinetuneConfig]):
    """The folder of a PlugLM experiment."""

    method = PLUGLM
    claims_at_once = False  # a refused run leaves a trained model in place
    incidental = HOW_FAST | {
        "checkpoint_every", "shards", "cpus_per_shard", "refresh_workers", "cpus_per_refresh_worker",
    }  # fmt: skip

    def others(self, stage: str) -> list[Any]:
        """Checksums of a training's inputs; raises as `inputs` does."""
        return self.inputs if stage in ("pretrain", "finetune") else []

    @cached_property
    def inputs(self) -> list[Any]:
        """Checksums of a training's files, computed once.

        Raises:
            UserError: a file is missing.
        """
        c = self.config
        if isinstance(c, PretrainConfig):
            texts = [c.documents, c.text, *([c.validation] if c.validation else [])]
            return [content_hash(config, checksum=self.input_files.sha256) for config in texts]
        weights = sorted(Path(c.model).glob("*.safetensors"))
        if not weights:
            raise UserError(f"{c.model}: no PlugLM model here.")
        files = [Path(path) for path in (c.data.train, c.data.validation, c.data.test) if path]
        if missing := [path for path in files if not path.is_file()]:
            raise UserError(f"{missing[0]}: no such file.")
        memory = None if c.memory.folder is None else versions.read(Path(c.memory.folder), c.memory.version).version
        return [c.model, [self.input_files.sha256(path) for path in (*files, *weights)], memory]
