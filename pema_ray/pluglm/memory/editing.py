"""Edits of a memory's folder: write segments, drop entries, publish a version on the current one.

`knowledge_memory` is the public interface. Imports no Ray.
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

_ATTEMPTS = 50  # of publishing; each failure means that another edit succeeded
Revision = tuple[tuple[Segment, ...], int]
"""(segments, next id) of the version to be published."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a memory: add entries, replace one, or delete entries.

    Attributes:
        entry_ids: of the deleted entries, or of the replaced one.
        entries: the new entries.
    """

    entry_ids: tuple[int, ...] = ()
    entries: tuple[NewEntry, ...] = ()

    def __post_init__(self) -> None:
        assert not (self.entry_ids and self.entries) or len(self.entry_ids) == len(self.entries) == 1

    @property
    def words(self) -> str:
        """The change in words, for the history."""
        if not self.entry_ids:
            return f"add {len(self.entries):,}"
        ids = ", ".join(map(str, self.entry_ids[:5])) + (", …" if len(self.entry_ids) > 5 else "")
        return f"{'replace' if self.entries else 'delete'} {ids}"


def publish_on_current(
    folder: Path,
    action: str,
    revise: Callable[[Version], Revision],
    only_on: int | None,
    fields: dict[str, Any] | None = None,
    fallback: Version | None = None,
) -> Version:
    """Publish `revise(current version)`; repeated on the newer version if another editor publishes first.

    Args:
        fields: other fields of the new manifest.
        fallback: an older version of this memory, to build on if the current one is damaged.

    Raises:
        VersionConflict: `only_on` was given, and another version is current.
        DamagedVersion: the current one cannot be read.
    """
    with versions.lock(folder, exclusive=False):
        for _ in range(_ATTEMPTS):
            base = _current(folder, fallback)
            if only_on is not None and base.version != only_on:
                raise VersionConflict(str(folder), only_on, base.version)
            segments, next_id = revise(base)
            update = {"version": base.version + 1, "parent": base.version, "action": action}
            update |= {"segments": segments, "next_id": next_id, **(fields or {})}
            version = base.model_copy(update=update)
            try:
                versions.publish(folder, version)
                return version
            except VersionConflict:
                if only_on is not None:
                    raise
    raise UserError(f"{folder}: others published {_ATTEMPTS} versions meanwhile; try again.")


def _current(folder: Path, fallback: Version | None) -> Version:
    try:
        return versions.read(folder)
    except DamagedVersion:
        if fallback is None:
            raise
    # The damaged version's next id is unknown, but it cannot have used more ids than there are rows.
    try:
        rows = sum(pq.read_metadata(path).num_rows for path in folder.glob("documents-*.parquet"))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder}: a file of documents is damaged as well: {error}. Build the memory anew.") from None
    next_id = max(version.next_id for version in versions.sound(folder)) + rows
    return fallback.model_copy(update={"version": versions.numbers(folder)[-1], "next_id": next_id})


def drop_entries(folder: Path, base: Version, entry_ids: Sequence[int]) -> tuple[Segment, ...]:
    """A version's segments without these entries. Raises `UserError` naming an unknown id."""
    segments = list(base.segments)
    for index, rows in rows_of(folder, base, entry_ids).items():
        dropped = tuple(sorted({*segments[index].dropped, *rows}))
        segments[index] = segments[index].model_copy(update={"dropped": dropped})
    return tuple(segment for segment in segments if segment.entries)


def rows_of(folder: Path, base: Version, entry_ids: Sequence[int]) -> dict[int, list[int]]:
    """{index of a segment: rows of these entries}. Raises `UserError` naming an unknown id."""
    requested = np.unique(np.asarray(list(entry_ids), np.int64))
    rows: dict[int, list[int]] = {}
    missing = set(requested.tolist())
    for index, segment in enumerate(base.segments):
        low, high = segment.first_id + segment.id_offset, segment.last_id + segment.id_offset
        if not missing or not ((requested >= low) & (requested <= high)).any():
            continue
        ids = read_documents(folder, segment.documents, ["entry_id"])["entry_id"].to_numpy() + segment.id_offset
        mask = np.isin(ids, requested)
        mask[list(segment.dropped)] = False
        if mask.any():
            rows[index] = np.flatnonzero(mask).tolist()
            missing -= set(ids[mask].tolist())
    if missing:
        raise UserError(f"{folder}: version {base.version} has no entry {min(missing)}.")
    return rows


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
    """Vectors of a segment's documents; an existing file is reused, unless it is damaged."""
    path = vectors_path(folder, documents, encoder.digest, dtype)
    if are_sound_vectors(path):
        return described(path)
    token_ids = read_documents(folder, documents, ["token_ids"])["token_ids"].to_pylist()
    return write_vectors(folder, documents, encoder.digest, dtype, *encoder.encode(token_ids))


def take_files(folder: Path, base: Version, source_folder: Path, source: Version) -> None:
    """Link or copy another memory's files into this folder.

    Raises:
        UserError: encoders, tokenizers or number formats differ.
    """
    for field, label, words in (
        ("fingerprint", "encoder_label", "keys of encoder"),
        ("tokenizer_fingerprint", "tokenizer_fingerprint", "tokens of tokenizer"),
        ("dtype", "dtype", "numbers in"),
    ):
        if getattr(base, field) != getattr(source, field):
            raise UserError(
                f"{source_folder}: {words} {getattr(source, label)}, but {folder} has those of {getattr(base, label)}. "
                "Build or refresh it with this memory's encoder and number format."
            )
    for name in source.files:
        _link_or_copy(source_folder / name, folder / name)


def require_new(folder: Path) -> None:
    """Raises `UserError` if the folder holds a memory."""
    if versions.numbers(folder):
        raise UserError(f"{folder}: a knowledge memory is here already. Edit it, or build in another folder.")


def require_texts(folder: Path, entries: Sequence[NewEntry], entry_ids: Sequence[int]) -> None:
    """Raises `UserError` naming an entry without text."""
    for entry_id, entry in zip(entry_ids, entries):
        if not entry.text.strip():
            raise UserError(f"{folder}: entry {entry_id} has no text.")


def require_writer(folder: Path, base: Version, encoder: DocumentEncoder) -> None:
    """Raises `StaleKeys` or `UserError` if the version belongs to another encoder or tokenizer."""
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
    """Give a file a second name, or copy it; files of a memory never change."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # another disk, or one without hard links
        temporary = temporary_beside(target)
        try:
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"{source}: cannot be copied to {target.parent}: {error.strerror or error}.") from None
        finally:
            temporary.unlink(missing_ok=True)
