"""The run folders of PlugLM's trainings: what a result depends on beside the table of stages. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.experiment.stage_run import HOW_FAST, StageRun, begin_anew
from pema_ray.pluglm.config import PretrainConfig
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.learning.text import content_hash
from pema_ray.pluglm.memory import versions
from pema_ray.pluglm.method import PLUGLM
from pema_ray.runtime.files import one_process, sha256_of


class PluglmRun(StageRun[PretrainConfig | FinetuneConfig]):
    """One training and what is made of it; a training's results lie in `run_dir` itself."""

    method = PLUGLM
    incidental = HOW_FAST | {
        "checkpoint_every", "shards", "cpus_per_shard", "refresh_workers", "cpus_per_refresh_worker",
    }  # fmt: skip

    def train(self, stage: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Do a training unless it is done; with `train.resume=false`, set aside what there is first."""
        if not self.config.train.resume:
            with one_process(self.folder):
                begin_anew(self.folder, self.stamp(stage))
        return self.perform(stage, work)

    def others(self, stage: str) -> list[Any]:
        """The content of files, wherever they lie.

        Raises:
            UserError: a file is missing.
        """
        c = self.config
        if stage not in ("pretrain", "finetune"):
            return []
        if isinstance(c, PretrainConfig):
            texts = [c.documents, c.text, *([c.validation] if c.validation else [])]
            return [content_hash(one) for one in texts]
        weights = sorted(Path(c.model).glob("*.safetensors"))
        if not weights:
            raise UserError(f"{c.model}: no PlugLM model here.")
        files = [Path(path) for path in (c.data.train, c.data.validation, c.data.test) if path]
        if missing := [path for path in files if not path.is_file()]:
            raise UserError(f"{missing[0]}: no such file.")
        memory = None if c.memory.folder is None else versions.read(Path(c.memory.folder), c.memory.version).version
        return [c.model, [sha256_of(path) for path in (*files, *weights)], memory]
