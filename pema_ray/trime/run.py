"""A TRIME run's folder: where each stage keeps its results, and how a finished stage is recognised and reused.

As in `pema_ray.stages.run`, every stage leaves `<run_dir>/<stage>/metrics.json` last of all, with a stamp of its
settings, the seed and the stamps of the stages it is made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.memory.shards import atomic_file
from pema_ray.progress import console
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.models import read_fingerprint
from pema_ray.trime.systems import asks_a_datastore

# Settings that change how fast a stage goes, not what it makes.
_INCIDENTAL = {
    "actors", "cpus_per_actor", "gpus_per_actor", "cpus_per_worker", "gpus_per_worker", "resume", "max_failures",
    "trackers", "min_workers", "search_actors", "batch_windows", "device",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What a stage depends on, and what it leaves."""

    sections: tuple[str, ...]
    """Sections of the configuration, or single settings (`batches.segment`)."""
    parents: tuple[str, ...]
    evidence: tuple[str, ...]
    """What must lie in its folder for its metrics to be believed."""


_WINDOWS = ("evaluate.tokens_per_sample", "evaluate.context_window", "batches.segment")
STAGES: dict[str, Stage] = {
    "prepare": Stage(("prepare",), (), ("vocabulary.json", "corpus.json")),
    "batches": Stage(("batches.segment", "batches.order", "batches.neighbours"), ("prepare",), ("walk.parquet",)),
    "train": Stage(("model", "batches", "train"), ("prepare",), ("model/config.json", "model/model.safetensors")),
    "datastore": Stage(("datastore", *_WINDOWS), ("train",), ("manifest.json",)),
    "index": Stage(("index",), ("datastore",), ("index.json",)),
    "evaluate": Stage(("evaluate", "batches.segment"), ("train",), ("evaluation.json", "table.md")),
    "report": Stage((), ("evaluate",), ("report.html",)),
}


class TrimeRun:
    """The folder of one TRIME experiment."""

    def __init__(self, config: TrimeConfig) -> None:
        self.config = config
        self.folder = Path(config.run_dir).absolute()  # workers have other working folders

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    @property
    def model_folder(self) -> Path:
        """The model that is evaluated."""
        chosen = self.config.evaluate.model
        return self.path("train", "model") if chosen is None else Path(chosen).absolute()

    def parents(self, stage: str) -> tuple[str, ...]:
        """The stages that it is made from: BM25's order, a training, a datastore only where they are used."""
        found = STAGES[stage].parents
        if stage == "train" and self.config.batches.order == "bm25":
            found += ("batches",)
        if self.config.evaluate.model is not None:  # a model of another run, on this one's text
            found = tuple("prepare" if parent == "train" else parent for parent in found)
        if stage == "evaluate" and asks_a_datastore(self.config):
            found += ("index",)
        return found

    def stamp(self, stage: str) -> str:
        """What the stage's result depends on, as 16 hex digits."""
        settings = {name: self._settings(name) for name in STAGES[stage].sections}
        c = self.config
        seed = c.prepare.seed if stage == "prepare" and c.prepare.seed is not None else c.seed
        described: list[Any] = [stage, seed, settings, [self.stamp(p) for p in self.parents(stage)]]
        if stage == "prepare":
            described.append(self._files())
        if stage in ("datastore", "evaluate") and c.evaluate.model is not None:
            described.append(read_fingerprint(self.model_folder))
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def _settings(self, name: str) -> Any:
        section, _, setting = name.partition(".")
        told = getattr(self.config, section).model_dump(mode="json")
        return told[setting] if setting else {k: v for k, v in told.items() if k not in _INCIDENTAL}

    def _files(self) -> list[list[Any]]:
        """Of the corpus: name, size and time of each file; of those that are gone, as they were when prepared."""
        names = [name for files in self.config.prepare.files.values() for name in files]
        found = [[name, (s := Path(name).stat()).st_size, s.st_mtime_ns] for name in names if Path(name).exists()]
        return found if len(found) == len(names) else self._read("prepare").get("files", found)

    def _read(self, stage: str) -> dict[str, Any]:
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
        found, command = self._read(stage), f"pema-ray trime {stage}"
        if not found:
            raise UserError(f"{self.folder}: stage '{stage}' has not been run yet. Run: {command}")
        if found.get("stamp") != self.stamp(stage):
            raise UserError(f"{self.path(stage)}: was made with other settings than this run's. Run again: {command}")
        return found

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Its metrics if the stage is done with these very settings."""
        try:
            found = self.metrics(stage)
        except UserError:
            return None
        return found if all(self.path(stage, name).exists() for name in STAGES[stage].evidence) else None

    def perform(self, stage: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Do a stage unless it is done: its parents must be; its metrics (a `summary` among them) are written last.

        What lies in the stage's folder under another stamp is removed first; under the same, `work` may go on with it.
        """
        self._require_parents(stage)
        if found := self.finished(stage):
            console.print(f"[dim]{stage:10} finished before, reused: {found['summary']}[/]", highlight=False)
            return found
        started = time.perf_counter()
        stamp = self._take_folder(stage)
        measured = {"stage": stage, "stamp": stamp, **work()}
        if stage == "prepare":
            measured["files"] = self._files()
        measured["seconds"] = round(time.perf_counter() - started, 2)
        with atomic_file(self.path(stage, "metrics.json")) as temporary:
            temporary.write_text(json.dumps(measured, indent=2) + "\n")
        console.print(f"[bold]{stage:10}[/] {measured['seconds']:7.1f} s  {measured['summary']}", highlight=False)
        return measured

    def _require_parents(self, stage: str) -> None:
        """All that a stage is made from, near and far: a later `prepare` may have replaced the text."""
        for parent in self.parents(stage):
            self.metrics(parent)
            self._require_parents(parent)

    def _take_folder(self, stage: str) -> str:
        folder, stamp = self.path(stage), self.stamp(stage)
        marker = folder / "stamp"
        if not marker.exists() or marker.read_text() != stamp:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with atomic_file(marker) as temporary:
                temporary.write_text(stamp)
        self.path(stage, "metrics.json").unlink(missing_ok=True)
        return stamp
