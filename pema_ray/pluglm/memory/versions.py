"""The versions of a memory: each one manifest, published whole or not at all, never changed.

`versions/<number>.json` lists the segments that a version consists of. The current version is the one with the highest
number: there is no pointer that could disagree. A version is published by giving its file a name that must be free, so
of two editors who build on the same parent one succeeds, and the other is told.
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
    """Somebody else published on top of the same version."""

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
        mend = "No older version is left to publish again; build the memory anew."
        if older:
            command = f"pema-ray pluglm memory swap {folder} {folder} --version {older[-1]}"
            mend = f"Publish an older version again: {command}."
        super().__init__(f"{path}: damaged: {what}. {mend}")
        self.path, self.what = path, what

    def __reduce__(self):
        return (DamagedVersion, (self.path, self.what))


class Version(Section):
    """What a memory is at one point of its history."""

    schema_version: int = SCHEMA_VERSION
    version: int
    parent: int | None
    """The version that was edited; none: built."""
    action: str
    """What was done to the parent, in words."""
    encoder: str
    """Name of the encoder of keys and values."""
    fingerprint: str
    """Of it."""
    tokenizer_fingerprint: str
    query_size: int
    hidden_size: int
    dtype: str
    """Number format of keys and values."""
    next_id: int
    """Of the next entry; ids are never given twice."""
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
                logger.debug("%s", error)  # who opens it is told


@contextmanager
def lock(folder: Path, exclusive: bool) -> Iterator[None]:
    """Editors hold it together, from their first file to their version's publication; pruning holds it alone, so that
    no file goes which an editor has found and is about to name.
    """
    path = folder / VERSIONS / _LOCK
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))  # network disks share a lock among those that may read alone
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            raise UserError(f"{path}: cannot be locked: {error.strerror or error}. Nothing was changed.") from None
        yield  # closing the file gives the lock back, and so does the death of a process


def read(folder: Path, version: int | None = None) -> Version:
    """A version, by default the current one.

    Raises:
        UserError: there is no memory, or no such version.
        DamagedVersion: it cannot be read.
    """
    known = numbers(folder)
    if not known:
        raise UserError(f"{folder}: no knowledge memory here. Make one: pema-ray pluglm memory build.")
    version = known[-1] if version is None else version
    if version not in known:
        raise UserError(f"{folder}: no version {version}; there are {known[0]} to {known[-1]}.")
    path = _path(folder, version)
    if is_pruned(folder, version):
        raise UserError(f"{folder}: version {version} was pruned; version {known[-1]} is current.")
    found = _fields(path)
    if isinstance(found, str):
        raise DamagedVersion(str(path), found)
    if found.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {found.get('schema_version')}, this version reads {SCHEMA_VERSION}.")
    return validate(Version, found, str(path))


def _fields(path: Path) -> dict[str, Any] | str:
    """A manifest's fields, or what is wrong with it."""
    try:
        found = json.loads(path.read_text(errors="replace"))
        if found.pop(_CHECKSUM, None) == _checksum(found):
            return found
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
        os.link(temporary, path)  # fails where the name is taken: this is the comparing and swapping
    except FileExistsError:
        raise VersionConflict(str(folder), version.parent or 0, numbers(folder)[-1]) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be published: {error.strerror or error}. Nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


def forget(folder: Path, version: int) -> None:
    """Empty a version's manifest. Its number stays taken, so that nobody publishes on top of an older one."""
    with atomic_file(_path(folder, version)) as temporary:
        temporary.write_text(_PRUNED)


def _path(folder: Path, version: int) -> Path:
    return folder / VERSIONS / f"{version:08d}.json"


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
