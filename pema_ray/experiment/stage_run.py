"""A run folder: where each stage keeps its results, and how a finished stage is recognised and reused.

Every stage leaves `<run_dir>/<stage>/metrics.json` last of all. Its stamp covers the stage's settings, the seed and
the stamps of what it was made from, so a stage is done again exactly when something it depends on changed. What the
stages are stands in the `Method` of an experiment; its subclass says only what a table cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import BaseModel

from pema_ray.errors import UserError
from pema_ray.experiment.input_files import InputFiles
from pema_ray.experiment.method import Method
from pema_ray.runtime.files import atomic_file, one_process
from pema_ray.runtime.progress import console

# Settings that change how fast a stage goes, not what it makes, wherever they stand.
HOW_FAST = frozenset(
    {
        "actors", "cpus_per_actor", "gpus_per_actor", "cpus_per_worker", "gpus_per_worker", "min_workers",
        "max_failures", "resume", "storage_path", "trackers",
    }
)  # fmt: skip


class Experiment(Protocol):
    """What a run needs of a configuration, beside its sections."""

    @property
    def run_dir(self) -> str: ...
    @property
    def seed(self) -> int: ...


E = TypeVar("E", bound=Experiment)


class StageRun(Generic[E]):
    """The folder of one experiment. A kind of experiment says what its stages depend on."""

    method: ClassVar[Method[Any]]
    """Its stages."""
    incidental: ClassVar[frozenset[str]] = HOW_FAST
    claims_at_once: ClassVar[bool] = True
    """Whether what other settings left is set aside as soon as a stage begins; else its work calls `claim`."""
    _metrics_before: str | None = None

    def __init__(self, config: E) -> None:
        self.config = config
        self.folder = Path(config.run_dir).absolute()  # workers have other working folders
        self.input_files = InputFiles(self.folder)

    def path(self, *parts: str) -> Path:
        """In the run's folder: `<run_dir>/<stage>/…`."""
        return self.folder.joinpath(*parts)

    # ── what a kind of experiment says ──────────────────────────────────────

    def sections(self, stage: str) -> tuple[str, ...]:
        """Sections of the configuration that it depends on, or single settings (`batches.segment`)."""
        return self.method.stages[stage].depends_on

    def parents(self, stage: str) -> tuple[str, ...]:
        """The stages that it is made from."""
        return self.method.stages[stage].parents

    def evidence(self, stage: str) -> tuple[str, ...]:
        """What must lie in its folder for its metrics to be believed."""
        return self.method.stages[stage].evidence

    @contextmanager
    def under_way(self, stage: str, stamp: str) -> Iterator[None]:
        """Around a stage's work: its folder is there, and has no metrics.

        Where the work claims the folder itself and is refused before, the metrics of the result that it left in place
        come back.
        """
        if self.claims_at_once:
            claim(self.path(stage), stamp)
            self.path(stage, "metrics.json").unlink(missing_ok=True)
            yield
            return
        self.path(stage).mkdir(parents=True, exist_ok=True)
        path = self.path(stage, "metrics.json")
        self._metrics_before = path.read_text() if path.exists() else None
        path.unlink(missing_ok=True)
        try:
            yield
        except UserError:
            if self._metrics_before is not None and self.is_whole(stage):
                with atomic_file(path) as temporary:
                    temporary.write_text(self._metrics_before)
            raise

    def claim(self, stage: str, anew: bool = False) -> None:
        """Set aside what other settings left in the folder of a stage that is under way, once nothing can refuse it.

        Args:
            anew: set aside what these settings left as well.
        """
        before, self._metrics_before = self._metrics_before, None
        (begin_anew if anew else claim)(self.path(stage), self.stamp(stage), before)

    def seed(self, stage: str) -> int:
        """What its stamp covers as the seed."""
        return self.config.seed

    def others(self, stage: str) -> list[Any]:
        """What else its result depends on, as JSON; files by their content (`input_files`)."""
        return []

    # ── finished stages ─────────────────────────────────────────────────────

    def stamp(self, stage: str) -> str:
        """What the stage's result depends on, as 16 hex digits."""
        settings = {name: self._settings(name) for name in self.sections(stage)}
        above = [self.stamp(parent) for parent in self.parents(stage)]
        described = [stage, self.seed(stage), settings, above, *self.others(stage)]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def _settings(self, name: str) -> Any:
        section, _, setting = name.partition(".")
        section_settings = chosen_settings(getattr(self.config, section))
        return (
            section_settings.get(setting)
            if setting
            else {k: v for k, v in section_settings.items() if k not in self.incidental}
        )

    def recorded(self, stage: str) -> dict[str, Any]:
        """What lies in a stage's `metrics.json`, whatever its stamp; nothing if it is not there or was torn."""
        try:
            metrics = json.loads(self.path(stage, "metrics.json").read_text())
            return metrics if isinstance(metrics, dict) else {}
        except (OSError, ValueError):
            return {}

    def metrics(self, stage: str) -> dict[str, Any]:
        """What a finished stage measured.

        Raises:
            UserError: it has not been run, or not with these settings.
        """
        metrics, name, command = self.recorded(stage), stage.replace("_", "-"), self.method.command(stage)
        if not metrics:
            raise UserError(f"{self.folder}: stage '{name}' has not been run yet. Run: {command}")
        if metrics.get("stamp") != self.stamp(stage):
            raise UserError(
                f"{self.path(stage)}: stage '{name}' was run with other settings than this run's. "
                f"Run it again: {command}"
            )
        return metrics

    def is_whole(self, stage: str) -> bool:
        """What it left is still there."""
        return all(self.path(stage, name).exists() for name in self.evidence(stage))

    def finished(self, stage: str) -> dict[str, Any] | None:
        """Its metrics if the stage is done with these very settings."""
        try:
            metrics = self.metrics(stage)
        except UserError:
            return None
        return metrics if self.is_whole(stage) else None

    def perform(self, stage: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Do a stage unless it is done: its parents must be; its metrics (a `summary` among them) are written last.

        Raises:
            UserError: a parent is not done, or another process is doing this stage.
        """
        self._require_parents(stage)
        if metrics := self._reused(stage):
            return metrics
        with one_process(self.path(stage)):
            bring_back(self.path(stage), self.stamp(stage))
            return self._reused(stage) or self._do(stage, work)

    def _reused(self, stage: str) -> dict[str, Any] | None:
        if metrics := self.finished(stage):
            console.print(f"[dim]{stage:13} finished before, reused: {metrics['summary']}[/]", highlight=False)
        return metrics

    def _do(self, stage: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        started, stamp = time.perf_counter(), self.stamp(stage)
        with self.under_way(stage, stamp):
            measured = work()
        seconds = round(time.perf_counter() - started, 2)
        text = json.dumps({"stage": stage, "stamp": stamp, "seconds": seconds, **measured}, indent=2)
        self.input_files.save()
        with atomic_file(self.path(stage, "metrics.json")) as temporary:
            temporary.write_text(text + "\n")
        metrics = json.loads(text)
        console.print(f"[bold]{stage:13}[/] {seconds:7.1f} s  {metrics['summary']}", highlight=False)
        return metrics

    def _require_parents(self, stage: str) -> None:
        """All that a stage is made from, near and far: a later `prepare` may have replaced the text."""
        for parent in self.parents(stage):
            self.metrics(parent)
            self._require_parents(parent)


def chosen_settings(section: BaseModel) -> dict[str, Any]:
    """The settings that are not the defaults, as JSON: a later version's new setting changes no stamp.

    A stamp does not tell either that a default has another value in a later version: whoever changes one renames the
    setting.
    """
    return section.model_dump(mode="json", exclude_defaults=True)


def claim(folder: Path, stamp: str, metrics: str | None = None) -> None:
    """Make a stage's folder that of a stamp. What another stamp left is set aside; what this one left comes back.

    Args:
        metrics: the `metrics.json` of what is set aside, where it was taken away already.
    """
    if _stamp_in(folder) == stamp or bring_back(folder, stamp, metrics):
        return
    begin_anew(folder, stamp, metrics)


def begin_anew(folder: Path, stamp: str, metrics: str | None = None) -> None:
    """Make a stage's folder that of a stamp; what is there is set aside, whatever its stamp."""
    _set_aside(folder, metrics)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / _MARKER) as temporary:
        temporary.write_text(stamp)


def bring_back(folder: Path, stamp: str, metrics: str | None = None) -> bool:
    """Put back what was set aside of a stamp last, in place of what is there; whether there was any."""
    if _stamp_in(folder) == stamp:
        return False
    returning = next((path for path in reversed(_aside(folder)) if _stamp_in(path) == stamp), None)
    if returning is None:
        return False
    _set_aside(folder, metrics)
    if folder.exists():
        folder.rmdir()  # empty
    os.replace(returning, folder)
    return True


def _set_aside(folder: Path, metrics: str | None) -> None:
    """Rename a stage's folder to `<folder>.before-1` (2, …), if anything was made in it."""
    if not folder.exists():
        return
    if {path.name for path in folder.iterdir()} <= {_MARKER}:  # nothing was made yet
        (folder / _MARKER).unlink(missing_ok=True)
        return
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)
    number = max((_number(path) for path in _aside(folder)), default=0) + 1
    aside = folder.with_name(f"{folder.name}.before-{number}")
    os.replace(folder, aside)
    console.print(f"[yellow]{folder}: what was there is kept as {aside.name}[/]", highlight=False)


def _aside(folder: Path) -> list[Path]:
    """What was set aside, the oldest first."""
    if not folder.parent.is_dir():
        return []
    named = re.compile(re.escape(folder.name) + r"\.before-\d+")
    return sorted((path for path in folder.parent.iterdir() if named.fullmatch(path.name)), key=_number)


def _number(aside: Path) -> int:
    return int(aside.name.rpartition("-")[2])


_MARKER = "stamp"


def _stamp_in(folder: Path) -> str | None:
    marker = folder / _MARKER
    return marker.read_text() if marker.is_file() else None
