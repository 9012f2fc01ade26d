"""The versions of a memory: one immutable manifest each, published atomically.

`versions/<number>.json` lists a version's segments. The current version has the highest number; no pointer can
disagree. Publishing links a file to a name that must be free: of two editors on the same parent one succeeds, and the
other gets a `VersionConflict`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.entries import FileInfo, Segment
from pema_ray.runtime.files import atomic_file, temporary_beside
from pema_ray.runtime.settings import Section, validate

logger = logging.getLogger(__name__)
VERSIONS = "versions"
SCHEMA_VERSION = 1
_CHECKSUM, _LOCK = "checksum", ".lock"
_PRUNED = '{"pruned": true}\n'


class VersionConflict(UserError):
    """Another editor published on the same version."""

    def __init__(self, folder: str, parent: int, current: int) -> None:
        super().__init__(
            f"{folder}: your edit builds on version {parent}, but version {current} is current by now. "
            "Look at what changed, and edit that one."
        )
        self.folder, self.parent, self.current = folder, parent, current

    def __reduce__(self):
        return (VersionConflict, (self.folder, self.parent, self.current))


class DamagedVersion(UserError):
    """A manifest that cannot be read."""

    def __init__(self, path: str, what: str) -> None:
        folder, version = Path(path).parent.parent, int(Path(path).stem)
        older = [n for n in numbers(folder) if n < version and not is_pruned(folder, n)]
        older = [n for n in older if isinstance(_fields(_path(folder, n)), dict)]
        remedy = "No older version is left to publish again; build the memory anew."
        if older:
            command = f"pema-ray pluglm memory swap {folder} {folder} --version {older[-1]}"
            remedy = f"Publish an older version again: {command}."
        super().__init__(f"{path}: damaged: {what}. {remedy}")
        self.path, self.what = path, what

    def __reduce__(self):
        return (DamagedVersion, (self.path, self.what))


class Version(Section):
    """The manifest of one version."""

    schema_version: int = SCHEMA_VERSION
    version: int
    parent: int | None
    """The version that was edited; None: built."""
    action: str
    """The edit, in words."""
    encoder: str
    """Name of the encoder of keys and values."""
    fingerprint: str
    """The encoder's fingerprint."""
    tokenizer_fingerprint: str
    query_size: int
    hidden_size: int
    dtype: str
    """Number format of keys and values."""
    next_id: int
    """Id of the next entry; ids are never given twice."""
    segments: tuple[Segment, ...]

    @property
    def entries(self) -> int:
        return sum(segment.entries for segment in self.segments)

    @property
    def files(self) -> dict[str, FileInfo]:
        """By name."""
        return {info.name: info for segment in self.segments for info in (segment.documents, segment.vectors)}

    @property
    def encoder_label(self) -> str:
        return f"{self.encoder} ({self.fingerprint})"


def numbers(folder: Path) -> list[int]:
    """All versions ever published, the pruned ones too."""
    return sorted(int(path.stem) for path in (folder / VERSIONS).glob("*.json") if path.stem.isdigit())


def is_pruned(folder: Path, version: int) -> bool:
    return _path(folder, version).read_bytes() == _PRUNED.encode()


def sound(folder: Path) -> Iterator[Version]:
    """All versions that were not pruned and are not damaged, the oldest first."""
    for number in numbers(folder):
        if not is_pruned(folder, number):
            try:
                yield read(folder, number)
            except DamagedVersion as error:
                logger.debug("%s", error)  # opening it raises this


@contextmanager
def lock(folder: Path, exclusive: bool) -> Iterator[None]:
    """Editors share it, from their first file to publication; pruning holds it alone, so that it deletes no file that
    an editor is about to reuse.
    """
    path = folder / VERSIONS / _LOCK
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))  # network disks need a readable file for a shared lock
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            raise UserError(f"{path}: cannot be locked: {error.strerror or error}. Nothing was changed.") from None
        yield  # closing the file releases the lock, and so does the end of the process


def read(folder: Path, version: int | None = None) -> Version:
    """A version, by default the current one.

    Raises:
        UserError: there is no memory, or no such version.
        DamagedVersion: it cannot be read.
    """
    published = numbers(folder)
    if not published:
        raise UserError(f"{folder}: no knowledge memory here. Make one: pema-ray pluglm memory build.")
    version = published[-1] if version is None else version
    if version not in published:
        raise UserError(f"{folder}: no version {version}; there are {published[0]} to {published[-1]}.")
    path = _path(folder, version)
    if is_pruned(folder, version):
        raise UserError(f"{folder}: version {version} was pruned; version {published[-1]} is current.")
    fields = _fields(path)
    if isinstance(fields, str):
        raise DamagedVersion(str(path), fields)
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {fields.get('schema_version')}, this version reads {SCHEMA_VERSION}.")
    return validate(Version, fields, str(path))


def _fields(path: Path) -> dict[str, Any] | str:
    """A manifest's fields, or its fault in words."""
    try:
        fields = json.loads(path.read_text(errors="replace"))
        if fields.pop(_CHECKSUM, None) == _checksum(fields):
            return fields
    except (ValueError, AttributeError) as error:
        return str(error)
    return "its checksum is not that of its contents"


def publish(folder: Path, version: Version) -> None:
    """Make `version` the current one, if its parent still is.

    Raises:
        VersionConflict: another version was published on top of the parent.
    """
    path = _path(folder, version.version)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert version.version == (version.parent or 0) + 1
    fields = version.model_dump(mode="json")
    temporary = temporary_beside(path)
    try:
        with temporary.open("w") as file:
            file.write(json.dumps({**fields, _CHECKSUM: _checksum(fields)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails if the name is taken: an atomic compare-and-swap
    except FileExistsError:
        raise VersionConflict(str(folder), version.parent or 0, numbers(folder)[-1]) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be published: {error.strerror or error}. Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


def forget(folder: Path, version: int) -> None:
    """Empty a version's manifest. Its number stays taken, so that no edit publishes on an older version."""
    with atomic_file(_path(folder, version)) as temporary:
        temporary.write_text(_PRUNED)


def _path(folder: Path, version: int) -> Path:
    return folder / VERSIONS / f"{version:08d}.json"


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
