"""How edits of a memory come about: segments written, entries dropped, a version published on the current one.

Works on folders and manifests; `knowledge_memory` is what people use. Imports no Ray.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.pluglm.memory import versions
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import (
    FileInfo,
    NewEntry,
    Segment,
    are_sound_vectors,
    described,
    read_documents,
    vectors_path,
    write_documents,
    write_vectors,
)
from pema_ray.pluglm.memory.versions import DamagedVersion, Version, VersionConflict
from pema_ray.pluglm.model.encoder import StaleKeys
from pema_ray.runtime.files import temporary_beside

_ATTEMPTS = 50  # of publishing while others publish; each failure means that another edit went through
Made = tuple[tuple[Segment, ...], int]
"""(segments, next id) of a version to be."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a memory: entries are added, one takes another's place (`replace`), or entries are deleted.

    Attributes:
        entry_ids: what goes; of `replace`, the one whose place is taken.
        entries: what comes.
    """

    entry_ids: tuple[int, ...] = ()
    entries: tuple[NewEntry, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.entry_ids and self.entries) or len(self.entry_ids) == len(self.entries) == 1

    @property
    def words(self) -> str:
        """For the history."""
        if not self.entry_ids:
            return f"add {len(self.entries):,}"
        named = ", ".join(map(str, self.entry_ids[:5])) + (", …" if len(self.entry_ids) > 5 else "")
        return f"{'replace' if self.entries else 'delete'} {named}"


def publish_on_current(
    folder: Path,
    action: str,
    made: Callable[[Version], Made],
    only_on: int | None,
    changes: dict[str, Any] | None = None,
    instead: Version | None = None,
) -> Version:
    """Publish what `made` makes of the current version; of a newer one when somebody was faster.

    Args:
        instead: an older version of this memory, to go on from if the current one is damaged.

    Raises:
        VersionConflict: `only_on` was given, and another version is current.
        DamagedVersion: the current one cannot be read.
    """
    with versions.lock(folder, exclusive=False):
        return _published(folder, action, made, only_on, changes or {}, instead)


def _published(
    folder: Path,
    action: str,
    made: Callable[[Version], Made],
    only_on: int | None,
    changes: dict[str, Any],
    instead: Version | None,
) -> Version:
    for _ in range(_ATTEMPTS):
        base = _current(folder, instead)
        if only_on is not None and base.version != only_on:
            raise VersionConflict(str(folder), only_on, base.version)
        segments, next_id = made(base)
        place = {"version": base.version + 1, "parent": base.version, "action": action}
        version = base.model_copy(update={**place, "segments": segments, "next_id": next_id, **changes})
        try:
            versions.publish(folder, version)
        except VersionConflict:
            if only_on is not None:
                raise
            continue
        return version
    raise UserError(f"{folder}: others published {_ATTEMPTS} versions meanwhile; try again.")


def _current(folder: Path, instead: Version | None) -> Version:
    try:
        return versions.read(folder)
    except DamagedVersion:
        if instead is None:
            raise
    # What the damaged version gave ids to is not known, but it cannot be more than there are rows.
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in folder.glob("documents-*.parquet"))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder}: a file of documents is damaged as well: {error}. Build the memory anew.") from None
    next_id = max(one.next_id for one in versions.sound(folder)) + rows
    return instead.model_copy(update={"version": versions.numbers(folder)[-1], "next_id": next_id})


def without(folder: Path, base: Version, entry_ids: Sequence[int]) -> tuple[Segment, ...]:
    """A version's segments with these entries dropped. Raises `UserError` naming one that is not there."""
    segments = list(base.segments)
    for index, rows in places(folder, base, entry_ids).items():
        dropped = tuple(sorted({*segments[index].dropped, *rows}))
        segments[index] = segments[index].model_copy(update={"dropped": dropped})
    return tuple(segment for segment in segments if segment.entries)


def places(folder: Path, base: Version, entry_ids: Sequence[int]) -> dict[int, list[int]]:
    """{segment's number: rows} of entries. Raises `UserError` naming one that is not there."""
    wanted = np.unique(np.asarray(list(entry_ids), np.int64))
    found: dict[int, list[int]] = {}
    left = set(wanted.tolist())
    for index, segment in enumerate(base.segments):
        low, high = segment.first_id + segment.id_offset, segment.last_id + segment.id_offset
        if not left or not ((wanted >= low) & (wanted <= high)).any():
            continue
        numbers = read_documents(folder, segment.documents, ["entry_id"])["entry_id"].to_numpy()
        here = np.isin(numbers + segment.id_offset, wanted)
        here[list(segment.dropped)] = False
        if here.any():
            found[index] = np.flatnonzero(here).tolist()
            left -= set((numbers[here] + segment.id_offset).tolist())
    if left:
        raise UserError(f"{folder}: version {base.version} has no entry {min(left)}.")
    return found


def new_segment(
    folder: Path,
    entries: Sequence[NewEntry],
    entry_ids: Sequence[int],
    encoder: DocumentEncoder,
    dtype: str,
    id_offset: int = 0,
) -> Segment:
    """Write entries with their vectors. Raises `UserError` if one has no text."""
    require_texts(folder, entries, [entry_id + id_offset for entry_id in entry_ids])
    token_ids = encoder.tokenize([entry.text for entry in entries])
    documents = write_documents(folder, entries, token_ids, list(entry_ids))
    vectors = write_vectors(folder, documents, encoder.digest, dtype, *encoder.encode(token_ids))
    return Segment(
        documents=documents, vectors=vectors, rows=len(entries),
        first_id=min(entry_ids), last_id=max(entry_ids), id_offset=id_offset,
    )  # fmt: skip


def encode_segment(folder: Path, documents: FileInfo, encoder: DocumentEncoder, dtype: str) -> FileInfo:
    """Vectors of a segment's documents; what was finished before is used, unless it is damaged."""
    path = vectors_path(folder, documents, encoder.digest, dtype)
    if are_sound_vectors(path):
        return described(path)
    token_ids = read_documents(folder, documents, ["token_ids"])["token_ids"].to_pylist()
    return write_vectors(folder, documents, encoder.digest, dtype, *encoder.encode(token_ids))


def take_files(folder: Path, base: Version, other_folder: Path, other: Version) -> None:
    """Have another memory's files in this folder, without a copy where the disk can.

    Raises:
        UserError: encoders, tokenizers or number formats differ.
    """
    for what, ours, theirs, shown in (
        ("keys of encoder", base.fingerprint, other.fingerprint, (base.encoder_label, other.encoder_label)),
        ("tokens of tokenizer", base.tokenizer_fingerprint, other.tokenizer_fingerprint, None),
        ("numbers in", base.dtype, other.dtype, None),
    ):
        if ours != theirs:
            ours, theirs = shown or (ours, theirs)
            raise UserError(
                f"{other_folder}: {what} {theirs}, but {folder} has those of {ours}. "
                "Build or refresh it with this memory's encoder and number format."
            )
    for name in other.files:
        _link_or_copy(other_folder / name, folder / name)


def require_new(folder: Path) -> None:
    """Raises `UserError` where a memory is already."""
    if versions.numbers(folder):
        raise UserError(f"{folder}: a knowledge memory is here already. Edit it, or build in another folder.")


def require_texts(folder: Path, entries: Sequence[NewEntry], entry_ids: Sequence[int]) -> None:
    """Raises `UserError` naming an entry without text."""
    for entry_id, entry in zip(entry_ids, entries):
        if not entry.text.strip():
            raise UserError(f"{folder}: entry {entry_id} has no text.")


def require_writer(folder: Path, base: Version, encoder: DocumentEncoder) -> None:
    """Raises `StaleKeys` or `UserError` when what this encoder writes could not be found among what is there."""
    if base.fingerprint != encoder.fingerprint:
        label = f"{encoder.name} ({encoder.fingerprint})"
        raise StaleKeys(f"{folder} version {base.version}", base.encoder_label, label)
    require_tokenizer(folder, base, encoder)


def require_tokenizer(folder: Path, base: Version, encoder: DocumentEncoder) -> None:
    if base.tokenizer_fingerprint != encoder.tokenizer_fingerprint:
        raise UserError(
            f"{folder}: its documents were tokenized by tokenizer {base.tokenizer_fingerprint}, but this encoder has "
            f"{encoder.tokenizer_fingerprint}. Build the memory anew."
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; files of a memory never change."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # another disk, or one that has no links
        temporary = temporary_beside(target)
        try:
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"{source}: cannot be copied to {target.parent}: {error.strerror or error}.") from None
        finally:
            temporary.unlink(missing_ok=True)
