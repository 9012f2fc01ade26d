"""The stages of a translation experiment and what each is made from, over `pema_ray.experiment.stage_run`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pema_ray.experiment.stage_run import StageRun, own_folder
from pema_ray.trime.mt.config import MtConfig
from pema_ray.trime.run import INCIDENTAL, described


@dataclass(frozen=True)
class Stage:
    """What a stage depends on, what it leaves, and the command that runs it."""

    sections: tuple[str, ...]
    parents: tuple[str, ...]
    evidence: tuple[str, ...]
    command: str


STAGES: dict[str, Stage] = {
    "prepare": Stage(("data",), (), ("train.parquet", "dev.parquet", "test.parquet"), "mt-train"),
    "train": Stage(("model", "batches", "train"), ("prepare",), ("model/trime_mt.json", "history.json"), "mt-train"),
    "datastore": Stage(("datastore",), ("train",), ("manifest.json",), "mt-datastore"),
    "index": Stage(("index",), ("datastore",), ("index.json",), "mt-datastore"),
    "generate": Stage(("generate",), ("train",), (), "mt-generate"),
}


class MtRun(StageRun[MtConfig]):
    """The folder of one translation experiment."""

    incidental = INCIDENTAL

    def sections(self, stage: str) -> tuple[str, ...]:
        return STAGES[stage].sections

    def parents(self, stage: str) -> tuple[str, ...]:
        found = STAGES[stage].parents
        return found + ("index",) if stage == "generate" and set(self.config.systems) != {"plain"} else found

    def evidence(self, stage: str) -> tuple[str, ...]:
        translations = (f"{name}.txt" for name in self.config.systems)
        return tuple(translations) if stage == "generate" else STAGES[stage].evidence

    def command(self, stage: str) -> str:
        return f"pema-ray trime {STAGES[stage].command}"

    def others(self, stage: str) -> list[Any]:
        return [self.config.model.name, self.files] if stage == "prepare" else []

    @property
    def files(self) -> list[list[Any]]:
        """Of the corpus: name, size and time of each file; of those that are gone, as they were when prepared."""
        names = [name for files in self.config.data.files.values() for name in files]
        return described(names, self.recorded("prepare").get("files"))

    def under_way(self, stage: str, stamp: str) -> AbstractContextManager[None]:
        return own_folder(self.path(stage), stamp)
