"""The run folder of a PEMA experiment, and what its stages share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pema_ray.errors import UserError
from pema_ray.experiment.stage_run import HOW_FAST, StageRun, chosen_settings
from pema_ray.line import LMHeadBundle
from pema_ray.memory.manifest import Manifest
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.method import PEMA
from pema_ray.tasks import Pair, Prompter, Task, load_task
from pema_ray.tasks.shots import SimilarShots, first_shots

COMPARE_PROTOCOL = "protocol 2"
"""Change this when new defaults or measurements change the figures: stamps leave out defaults."""
_ADAM_SCHEME = "best on dev"  # how the `adam` solver of stage 1 ends


class Run(StageRun[ExperimentConfig]):
    """The folder of one experiment."""

    method = PEMA
    incidental = HOW_FAST | {
        "overwrite", "max_rejected", "threads", "published", "max_actors", "requests_in_flight", "patience_seconds",
        "key_file", "ca_file", "timeout_seconds", "workers", "prefix",
    }  # fmt: skip
    claims_at_once = False  # a refused training keeps the existing adapter

    def others(self, stage: str) -> list[Any]:
        if stage == "prepare":
            return [chosen_settings(self.task), self.file_hashes]
        if stage == "export_head" and self.config.plm.prefix is not None:  # it names a folder that may be trained anew
            return [self.input_files.sha256(Path(self.config.plm.prefix).expanduser())]
        if stage == "compare":
            return [COMPARE_PROTOCOL]
        if stage != "train":
            return []
        train = self.config.train  # with windows, the number of steps depends on the number of workers
        windows = [["workers", train.workers]] if train.shuffle == "window" else []
        return [*windows, _ADAM_SCHEME] if train.solver == "adam" else windows

    @property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of the task's files by split."""
        paths = {**self.task.source.files, **self.config.task.files}
        return {split: checksum for split, path in paths.items() if (checksum := self.input_files.sha256(path))}

    def is_whole(self, stage: str) -> bool:
        if stage == "build_memory":
            try:
                return self._memory_is_whole()
            except UserError:
                return False
        return super().is_whole(stage)

    def _memory_is_whole(self) -> bool:
        """Whether every shard exists; a user may have deleted a damaged one, to have it rebuilt."""
        for split in self.config.build_memory.splits:
            folder = self.path("build_memory", split)
            if not all((folder / shard.name).exists() for shard in Manifest.read(folder).shards):
                return False
        return True

    # ── what stages share ───────────────────────────────────────────────────

    @cached_property
    def task(self) -> Task:
        return load_task(self.config.task.name)

    @cached_property
    def bundle(self) -> LMHeadBundle:
        return LMHeadBundle.load(self.path("export_head", "lm_head"))

    @cached_property
    def tokenizer(self):
        return self.bundle.tokenizer()

    def pairs(self, split: str) -> list[Pair]:
        """The prepared pairs of a split."""
        import pyarrow.parquet as pq

        path = self.path("prepare", f"{split}.parquet")
        if not path.exists():
            raise UserError(f"{path}: no such prepared split. Run: pema-ray prepare")
        return [Pair(**row) for row in pq.read_table(path).to_pylist()]

    def prompter(
        self,
        shots: int | None = None,
        show: Literal["first", "similar"] | None = None,
        limit: int | None = None,
    ) -> Prompter:
        """The prompts of this experiment, or the same with another number or choice of examples.

        Args:
            limit: choose examples among this many training pairs, from the first.
        """
        task = self.config.task
        shots = task.shots if shots is None else shots
        choose = SimilarShots if (show or task.show) == "similar" else first_shots
        examples = choose(self.pairs("train")[:limit], shots) if shots else []
        return Prompter(self.tokenizer, self.task, examples, task.chat, task.chat_template_kwargs)
