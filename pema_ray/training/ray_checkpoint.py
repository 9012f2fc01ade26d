"""Ray Train's copies of checkpoints: workers report them, and a run that has lost its own checkpoint resumes from one.

The files in the run's folder are authoritative: they are replaced atomically and at once. Ray Train's copies lag
behind, since its controller sees a report only when it next polls the workers, and it overwrites its record in place.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file, temporary_beside
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.history import OnSaved
from pema_ray.training.strategies import Place

logger = logging.getLogger(__name__)
RAY_TRAIN = "ray_train"
"""Ray Train's folder in a run's folder, unless `storage_path` names another place."""
REPORT_SECONDS = 2.0
"""Minimum time between two reports: the controller takes one per poll, every 2 s, and the next report waits for it."""

_STAGED = ".reported"
_STAMP = "stamp"  # in a run's folder: hash of its settings


@dataclass(frozen=True)
class Storage:
    """Where Ray Train keeps a run: what `RunConfig` calls `storage_path` and `name`."""

    path: str
    name: str

    @classmethod
    def of(cls, run_dir: Path, storage_path: str | None) -> Storage:
        """In the run's folder, or under `storage_path` by a name unique to this folder and its settings."""
        folder = run_dir.resolve()
        if storage_path is None:
            return cls(str(folder), RAY_TRAIN)
        stamp = (folder / _STAMP).read_text() if (folder / _STAMP).exists() else ""
        digest = hashlib.sha256(f"{folder}\n{stamp}".encode()).hexdigest()[:16]
        path = storage_path if "://" in storage_path else str(Path(storage_path).absolute())
        return cls(path, "-".join([*folder.parts[-2:], digest]))

    def prepare(self, resume: bool, has_checkpoint: bool) -> None:
        """Delete unregistered checkpoints; without `resume`, delete everything.

        Args:
            has_checkpoint: the run's own folder has one, so that an unreadable record may be deleted too.

        Raises:
            UserError: the storage cannot be used, or it has the only checkpoint and Ray Train cannot read its record.
        """
        import pyarrow.fs

        try:
            files, root = pyarrow.fs.FileSystem.from_uri(self.path)
            folder = f"{root.rstrip('/')}/{self.name}"
            registered = self._registered(files, folder, has_checkpoint) if resume else None
            files.create_dir(folder)
            for entry in files.get_file_info(pyarrow.fs.FileSelector(folder)):
                if entry.type == pyarrow.fs.FileType.Directory and entry.base_name not in (registered or ()):
                    files.delete_dir(entry.path)
                elif entry.is_file and registered is None:
                    files.delete_file(entry.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be used as train.storage_path: {error}") from None

    def _registered(self, files: Any, folder: str, has_checkpoint: bool) -> set[str] | None:
        """Names of the checkpoints in Ray Train's record; None without a usable record."""
        import pyarrow.fs
        from ray.train import Result
        from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

        record = f"{folder}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
        if files.get_file_info(record).type == pyarrow.fs.FileType.NotFound:
            return None
        try:
            checkpoints = Result.from_path(folder, storage_filesystem=files).best_checkpoints or []
        except OSError:
            raise
        except Exception as error:  # torn, or of another version of Ray
            if has_checkpoint:
                logger.warning("%s: Ray Train's record cannot be read; the run's own checkpoint is used", record)
                return None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"{record}: cannot be read: {lines[-1]} Use the version of Ray that wrote it, or start over with "
                "train.resume=false."
            ) from None
        return {Path(checkpoint.path).name for checkpoint, _ in checkpoints}


def restore_checkpoint(run_dir: Path) -> None:
    """Copy Ray Train's last checkpoint into the run's folder if that has none; every worker calls this first."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    context = ray.train.get_context()
    if context.get_world_rank() == 0 and not (run_dir / CHECKPOINT).exists():
        with checkpoint.as_directory() as folder:
            _copy_all(Path(folder), run_dir)
        logger.warning("%s: no checkpoint there; training resumes from Ray Train's copy", run_dir)
    if context.get_world_size() > 1:
        torch.distributed.barrier()


@contextmanager
def reporting_checkpoints(run_dir: Path, place: Place, names: Sequence[str]) -> Iterator[OnSaved]:
    """An `on_saved`: reports the checkpoints of a training that runs in the block; all workers report equally often.

    A checkpoint that follows another within `REPORT_SECONDS` is reported with the next one; the last is reported at
    the end of the block.

    Args:
        names: files and folders in the run's folder that a resumed run needs, `CHECKPOINT` among them.

    Raises:
        UserError: the disk is full.
    """
    unreported: dict[str, Any] | None = None  # metrics of the latest checkpoint
    reported_at = -math.inf

    def on_saved(metrics: Mapping[str, Any]) -> None:
        nonlocal unreported, reported_at
        unreported = dict(metrics)
        is_due = torch.tensor(int(time.monotonic() - reported_at >= REPORT_SECONDS), device=place.device)
        if place.broadcast(is_due):  # by the leading worker's clock
            _report(run_dir, place, names, unreported)
            unreported, reported_at = None, time.monotonic()

    yield on_saved
    if unreported is not None:
        _report(run_dir, place, names, unreported)


def _report(run_dir: Path, place: Place, names: Sequence[str], metrics: dict[str, Any]) -> None:
    import ray.train

    checkpoint = None
    if place.leads:
        checkpoint = ray.train.Checkpoint.from_directory(str(_stage(run_dir, names)))
    try:
        ray.train.report(metrics, checkpoint)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # a bucket may recover: Ray Train restarts the workers
        raise UserError(f"{run_dir}: Ray Train cannot keep a checkpoint: {error.strerror}.") from None
    if place.leads:
        shutil.rmtree(run_dir / _STAGED, ignore_errors=True)


def _stage(run_dir: Path, names: Sequence[str]) -> Path:
    """A folder of a checkpoint's files alone, for Ray Train to copy: hard links where the disk supports them."""
    folder = run_dir / _STAGED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names:
        source = run_dir / name
        if source.is_dir():
            shutil.copytree(source, folder / name, copy_function=_link)
        elif source.exists():
            _link(source, folder / name)
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _copy_all(folder: Path, run_dir: Path) -> None:
    """Copy a checkpoint's files, `CHECKPOINT` last: its presence means that all are there."""
    for source in sorted(folder.iterdir(), key=lambda path: path.name == CHECKPOINT):
        target = run_dir / source.name
        if source.is_dir():
            beside = temporary_beside(target)
            try:
                shutil.copytree(source, beside)
                shutil.rmtree(target, ignore_errors=True)
                beside.rename(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        else:
            with atomic_file(target) as temporary:
                shutil.copyfile(source, temporary)
