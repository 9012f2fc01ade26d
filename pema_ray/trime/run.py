"""The run folder of a TRIME experiment: what its stages depend on beyond their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pema_ray.experiment.stage_run import HOW_FAST, StageRun
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.evaluation.systems import needs_datastore
from pema_ray.trime.method import TRIME
from pema_ray.trime.model.registry import read_fingerprint

INCIDENTAL = HOW_FAST | {"search_actors", "batch_windows", "device"}


class TrimeRun(StageRun[TrimeConfig]):
    """The folder of one TRIME experiment."""

    method = TRIME
    incidental = INCIDENTAL

    @property
    def model_folder(self) -> Path:
        """The model that is evaluated."""
        folder = self.config.evaluate.model
        return self.path("train", "model") if folder is None else Path(folder).absolute()

    def parents(self, stage: str) -> tuple[str, ...]:
        """BM25's order, a training and a datastore only where they are used."""
        parents = super().parents(stage)
        if stage == "train" and self.config.batches.order == "bm25":
            parents += ("batches",)
        if self.config.evaluate.model is not None:  # a model of another run, on this one's text
            parents = tuple("prepare" if parent == "train" else parent for parent in parents)
        if stage == "evaluate" and needs_datastore(self.config):
            parents += ("index",)
        return parents

    def seed(self, stage: str) -> int:
        c = self.config
        return c.prepare.seed if stage == "prepare" and c.prepare.seed is not None else c.seed

    def others(self, stage: str) -> list[Any]:
        """The text, and what belongs to other runs: a vocabulary, a model, datastores."""
        c, inputs = self.config, []
        if stage == "prepare":
            inputs.append([self.input_files.sha256(name) for files in c.prepare.files.values() for name in files])
            if c.prepare.vocabulary_from is not None:
                inputs.append(self.input_files.sha256(Path(c.prepare.vocabulary_from, "prepare", "vocabulary.json")))
        if stage in ("datastore", "evaluate") and c.evaluate.model is not None:
            inputs.append(read_fingerprint(self.model_folder))
        if stage == "evaluate" and needs_datastore(c):
            inputs.append({name: self._identity(Path(folder)) for name, folder in c.evaluate.datastores.items()})
        return inputs

    def _identity(self, datastore: Path) -> list[str | None]:
        """Checksums of a datastore and its index, whose files name their contents by checksums."""
        parts = (datastore / "manifest.json", datastore.parent / "index" / "index.json")
        return [self.input_files.sha256(path) for path in parts]
