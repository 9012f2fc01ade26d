"""The run folder of a translation experiment: what its stages depend on beyond their table."""

from __future__ import annotations

from typing import Any

from pema_ray.experiment.stage_run import StageRun
from pema_ray.trime.run import INCIDENTAL
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.method import TRANSLATION


class MtRun(StageRun[MtConfig]):
    """The folder of one translation experiment."""

    method = TRANSLATION
    incidental = INCIDENTAL

    def parents(self, stage: str) -> tuple[str, ...]:
        parents = super().parents(stage)
        return parents + ("index",) if stage == "generate" and set(self.config.systems) != {"plain"} else parents

    def evidence(self, stage: str) -> tuple[str, ...]:
        translations = tuple(f"{name}.txt" for name in self.config.systems)
        return translations if stage == "generate" else super().evidence(stage)

    def others(self, stage: str) -> list[Any]:
        """The model's name, and the text."""
        names = [name for files in self.config.data.files.values() for name in files]
        return [self.config.model.name, list(map(self.input_files.sha256, names))] if stage == "prepare" else []
