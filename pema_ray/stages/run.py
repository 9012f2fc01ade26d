"""A run folder: where each stage keeps its results, and how a finished stage is recognised and reused.

Every stage leaves `<run_dir>/<stage>/metrics.json` last of all. Its stamp covers the stage's settings and the
stamps of what it was made from, so a stage is done again exactly when something it depends on changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pema_ray.config import ExperimentConfig
from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle
from pema_ray.memory.manifest import Manifest
from pema_ray.memory.shards import atomic_file, sha256_of
from pema_ray.progress import console
from pema_ray.tasks import Pair, Prompter, Task, load_task
from pema_ray.tasks.shots import SimilarShots, first_shots

# stage → (settings it depends on, stages it is made from)
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prepare": (("task",), ()),
    "export_head": (("plm",), ()),
    "build_memory": (("build_memory",), ("prepare", "export_head")),
    "train": (("train",), ("build_memory",)),
    "generate": (("generate",), ("train",)),
    "evaluate": (("evaluate",), ("generate",)),
    "report": ((), ("evaluate",)),
}
# Beside the chain: done when it is asked for.
_EXTRA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "compare": (("compare", "train", "generate"), ("build_memory",)),
}
# What must lie in a stage's folder for its metrics to be believed (a memory is asked shard by shard).
_EVIDENCE: dict[str, tuple[str, ...]] = {
    "prepare": ("train.parquet", "dev.parquet", "test.parquet"),
    "export_head": ("lm_head/bundle.json",),
    "train": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "history.json"),
    "generate": ("answers.jsonl",),
    "evaluate": ("evaluation.json",),
    "report": ("report.html",),
    "compare": ("comparison.json", "table.md"),
}
# Settings that change how fast a stage goes, not what it makes.
_INCIDENTAL = {
    "actors",
    "cpus_per_actor",
    "gpus_per_actor",
    "overwrite",
    "max_rejected",
    "resume",
    "threads",
    "cpus_per_worker",
    "gpus_per_worker",
    "published",
    "max_failures",
    "trackers",
    "min_workers",
}


class Run:
    """The folder of one experiment."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.folder = Path(config.run_dir).absolute()  # workers have other working folders

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    # ── finished stages ─────────────────────────────────────────────────────

    def stamp(self, stage: str) -> str:
        """What the stage's result depends on, as 16 hex digits."""
        sections, parents = (STAGES | _EXTRA)[stage]
        settings = {
            name: {k: v for k, v in getattr(self.config, name).model_dump(mode="json").items() if k not in _INCIDENTAL}
            for name in sections
        }
        described = [stage, self.config.seed, settings, [self.stamp(parent) for parent in parents]]
        if stage == "prepare":
            described += [self.task.model_dump(mode="json"), self.file_hashes]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of the task's files by split; of those that are gone since they were prepared, as they were then."""
        paths = {**self.task.source.files, **self.config.task.files}
        before = self._read_metrics("prepare").get("file_hashes", {})
        return before | {s: sha256_of(Path(p)) for s, p in paths.items() if Path(p).is_file()}

    def _read_metrics(self, stage: str) -> dict[str, Any]:
        """What lies in a stage's `metrics.json`; nothing if it is not there or was torn."""
        try:
            found = json.loads(self.path(stage, "metrics.json").read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def metrics(self, stage: str) -> dict[str, Any]:
        """What a finished stage measured.

        Raises:
            UserError: it has not been run, or not with these settings.
        """
        found, command = self._read_metrics(stage), stage.replace("_", "-")
        if not found:
            raise UserError(f"{self.folder}: stage '{command}' has not been run yet. Run: pema-ray {command}")
        if found.get("stamp") != self.stamp(stage):
            raise UserError(
                f"{self.path(stage)}: stage '{command}' was run with other settings than this run's. "
                f"Run it again: pema-ray {command}"
            )
        return found

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Its metrics if the stage is done with these very settings."""
        try:
            found = self.metrics(stage)
        except UserError:
            return None
        return found if self._is_whole(stage) else None

    def _is_whole(self, stage: str) -> bool:
        if stage == "build_memory":
            try:
                return self._memory_is_whole()
            except UserError:
                return False
        return all(self.path(stage, name).exists() for name in _EVIDENCE[stage])

    def _memory_is_whole(self) -> bool:
        """Every shard of every manifest is there: a user may have deleted a damaged one, to have it made again."""
        for split in self.config.build_memory.splits:
            folder = self.path("build_memory", split)
            if not all((folder / shard.name).exists() for shard in Manifest.read(folder).shards):
                return False
        return True

    def perform(self, stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a stage unless it is done: its parents must be; its metrics are written last."""
        self._require_parents(stage)
        if found := self.finished(stage):
            console.print(f"[dim]{stage:13} finished before, reused: {found['summary']}[/]")
            return found
        started = time.perf_counter()
        self.path(stage).mkdir(parents=True, exist_ok=True)
        with self._metrics_set_aside(stage):
            measured = work()
        seconds = round(time.perf_counter() - started, 2)
        text = json.dumps({"stage": stage, "stamp": self.stamp(stage), "seconds": seconds, **measured}, indent=2)
        with atomic_file(self.path(stage, "metrics.json")) as temporary:
            temporary.write_text(text + "\n")
        metrics = json.loads(text)
        console.print(f"[bold]{stage:13}[/] {seconds:7.1f} s  {metrics['summary']}")
        return metrics

    @contextmanager
    def _metrics_set_aside(self, stage: str) -> Iterator[None]:
        """A stage that is under way has no metrics; one that was refused keeps those of the result it left in place."""
        path = self.path(stage, "metrics.json")
        before = path.read_text() if path.exists() else None
        path.unlink(missing_ok=True)
        try:
            yield
        except UserError:
            if before is not None and self._is_whole(stage):
                with atomic_file(path) as temporary:
                    temporary.write_text(before)
            raise

    def _require_parents(self, stage: str) -> None:
        """All that a stage is made from, near and far: a later `prepare` may have replaced the pairs."""
        for parent in (STAGES | _EXTRA)[stage][1]:
            self.metrics(parent)
            self._require_parents(parent)

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

    def prompter(self, shots: int | None = None, show: Literal["first", "similar"] | None = None) -> Prompter:
        """The prompts of this experiment, or the same with another number or choice of examples."""
        task = self.config.task
        shots, similar = task.shots if shots is None else shots, (show or task.show) == "similar"
        if shots and similar:
            return Prompter(self.tokenizer, self.task, SimilarShots(self.pairs("train"), shots), task.chat)
        shown = first_shots(self.pairs("train"), shots) if shots else []
        return Prompter(self.tokenizer, self.task, shown, task.chat)
