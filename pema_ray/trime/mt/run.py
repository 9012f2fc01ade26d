"""A translation run's folder: where each stage keeps its results, and how a finished stage is recognised and reused.

As in `pema_ray.trime.run`: a stage leaves `<stage>/metrics.json` last of all, with a stamp of its settings, the seed
and the stamps of the stages it is made from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.memory.shards import atomic_file
from pema_ray.progress import console
from pema_ray.trime.mt.config import MtConfig
from pema_ray.trime.run import _INCIDENTAL

# Stage -> (sections of the configuration, the stage it is made from, its command).
STAGES: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "prepare": (("data",), None, "mt-train"),
    "train": (("model", "batches", "train"), "prepare", "mt-train"),
    "datastore": (("datastore",), "train", "mt-datastore"),
    "index": (("index",), "datastore", "mt-datastore"),
    "generate": (("generate",), "train", "mt-generate"),
}


class MtRun:
    """The folder of one translation experiment."""

    def __init__(self, config: MtConfig) -> None:
        self.config = config
        self.folder = Path(config.run_dir).absolute()  # workers have other working folders

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    @property
    def systems(self) -> tuple[str, ...]:
        """What is decoded with: as configured, or what goes with the training objective."""
        trime = self.config.train.memory == "trime"
        return self.config.generate.systems or ("plain", "trime" if trime else "knn")

    def parents(self, stage: str) -> tuple[str, ...]:
        _, parent, _ = STAGES[stage]
        found = () if parent is None else (parent,)
        return found + ("index",) if stage == "generate" and set(self.systems) != {"plain"} else found

    def stamp(self, stage: str) -> str:
        """What the stage's result depends on, as 16 hex digits."""
        told = {
            name: {k: v for k, v in getattr(self.config, name).model_dump(mode="json").items() if k not in _INCIDENTAL}
            for name in STAGES[stage][0]
        }
        described = [stage, self.config.seed, told, [self.stamp(parent) for parent in self.parents(stage)]]
        if stage == "prepare":
            described += [self.config.model.name, self._files()]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def _files(self) -> list[list[Any]]:
        """Name, size and time of each file of the corpus; of those that are gone, as they were when prepared."""
        names = [Path(name) for files in self.config.data.files.values() for name in files]
        found = [[str(n), (s := n.stat()).st_size, s.st_mtime_ns] for n in names if n.exists()]
        return found if len(found) == len(names) else self._read("prepare").get("files", found)

    def _read(self, stage: str) -> dict[str, Any]:
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
        found, command = self._read(stage), f"pema-ray trime {STAGES[stage][2]}"
        if not found:
            raise UserError(f"{self.folder}: stage '{stage}' has not been run yet. Run: {command}")
        if found.get("stamp") != self.stamp(stage):
            raise UserError(f"{self.path(stage)}: was made with other settings than this run's. Run again: {command}")
        return found

    def perform(self, stage: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Do a stage unless it is done; its metrics (a `summary` among them) are written last.

        What lies in its folder under another stamp is removed first; under the same, `work` may go on with it.
        """
        self._require_parents(stage)
        stamp, found = self.stamp(stage), self._read(stage)
        if found.get("stamp") == stamp:
            console.print(f"[dim]{stage:10} finished before, reused: {found['summary']}[/]", highlight=False)
            return found
        folder, begun = self.path(stage), self.path(stage, ".stamp")
        if folder.exists() and (not begun.exists() or begun.read_text() != stamp):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(begun) as temporary:
            temporary.write_text(stamp)
        started = time.perf_counter()
        measured: dict[str, Any] = {"stage": stage, "stamp": stamp, **work()}
        if stage == "prepare":
            measured["files"] = self._files()
        measured["seconds"] = round(time.perf_counter() - started, 2)
        with atomic_file(folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(measured, indent=2) + "\n")
        console.print(f"[bold]{stage:10}[/] {measured['seconds']:7.1f} s  {measured['summary']}", highlight=False)
        return measured

    def _require_parents(self, stage: str) -> None:
        """All that a stage is made from, near and far: a later preparation may have replaced the text."""
        for parent in self.parents(stage):
            self.metrics(parent)
            self._require_parents(parent)
