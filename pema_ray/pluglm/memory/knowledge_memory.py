"""The editable memory on disk. Every edit publishes a new version atomically; versions never change.

`KnowledgeMemory` is one version; edits return the next. Concurrent editors each publish on the version that is then
current, so no edit is lost; of two edits of one entry the later one wins. Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pema_ray.errors import UserError
from pema_ray.pluglm.memory import versions
from pema_ray.pluglm.memory.editing import (
    Change,
    Revision,
    drop_entries,
    encode_segment,
    new_segment,
    publish_on_current,
    require_new,
    require_tokenizer,
    require_writer,
    rows_of,
    take_files,
)
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import Entry, FileInfo, NewEntry, Segment, VectorDtype, read_documents, read_vectors
from pema_ray.pluglm.memory.tensors import EntryFilter, load_entries
from pema_ray.pluglm.memory.versions import Version
from pema_ray.pluglm.model.encoder import StaleKeys
from pema_ray.pluglm.model.knowledge import LocalKnowledge
from pema_ray.runtime.files import sha256_of

ENTRY_COLUMNS = ("entry_id", "text", "source", "document_id", "tags", "token_ids")


class KnowledgeMemory:
    """One version of a memory; it stays readable until it is pruned."""

    def __init__(self, folder: Path, manifest: Version) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path | str, version: int | None = None) -> KnowledgeMemory:
        """A version; by default the current one. Raises `UserError` where there is no memory or no such version."""
        return cls(Path(folder), versions.read(Path(folder), version))

    @classmethod
    def build(
        cls,
        folder: Path | str,
        entries: Iterable[NewEntry],
        encoder: DocumentEncoder,
        dtype: VectorDtype = "float16",
        entries_per_segment: int = 4096,
    ) -> KnowledgeMemory:
        """Version 1 of a new memory, in this process (`refresh.build` does it on Ray Data).

        Raises:
            UserError: there are no entries, an entry has no text, or the folder holds a memory.
        """
        folder = Path(folder)
        require_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        iterator, segments, next_id = iter(entries), [], 0
        while block := list(islice(iterator, entries_per_segment)):
            segments.append(new_segment(folder, block, range(len(block)), encoder, dtype, next_id))
            next_id += len(block)
        return cls.first(folder, segments, encoder, dtype, f"build {next_id:,}")

    @classmethod
    def first(
        cls, folder: Path, segments: Sequence[Segment], encoder: DocumentEncoder, dtype: str, action: str
    ) -> KnowledgeMemory:
        """Publish version 1 of segments whose files are in the folder."""
        entries = sum(segment.rows for segment in segments)
        if not entries:
            raise UserError(f"{folder}: a memory needs entries, and none were given.")
        version = Version(
            version=1, parent=None, action=action, **_encoder_fields(encoder),
            tokenizer_fingerprint=encoder.tokenizer_fingerprint, dtype=dtype, next_id=entries, segments=tuple(segments),
        )  # fmt: skip
        versions.publish(folder, version)
        return cls(folder, version)

    # ── edits: each returns the new version ─────────────────────────────────

    def edit(
        self, changes: Sequence[Change], encoder: DocumentEncoder | None, only_on: int | None = None, least: int = 0
    ) -> KnowledgeMemory:
        """Publish several changes, in their order, as one version: all of them, or none.

        Args:
            encoder: not needed for deletions alone.
            only_on: publish only if this version is current, here and in the other edits. None: on any version.
            least: refuse to leave fewer entries.

        Raises:
            VersionConflict: another version than `only_on` is current.
            StaleKeys: the memory belongs to another encoder.
            UserError: there are no changes, an id is unknown, or an entry has no text.
        """
        if not changes:
            raise UserError(f"{self.folder}: nothing to do.")
        with versions.lock(self.folder, exclusive=False):
            dtype = versions.read(self.folder).dtype
            written = []
            for change in changes:
                segment = None
                if change.entries:
                    assert encoder is not None
                    require_writer(self.folder, versions.read(self.folder), encoder)
                    ids = change.entry_ids or range(len(change.entries))
                    segment = new_segment(self.folder, change.entries, ids, encoder, dtype)
                written.append((change, segment))

            def revise(base: Version) -> Revision:
                segments, next_id = base.segments, base.next_id
                for change, segment in written:
                    if segment is not None and encoder is not None:
                        require_writer(self.folder, base, encoder)
                    if change.entry_ids:
                        edited = base.model_copy(update={"segments": segments})
                        segments = drop_entries(self.folder, edited, change.entry_ids)
                    elif segment is not None:
                        segment = segment.model_copy(update={"id_offset": next_id})
                        next_id += segment.rows
                    segments += () if segment is None else (segment,)
                if (entries := sum(segment.entries for segment in segments)) < least:
                    raise UserError(f"{self.folder}: {entries} entries would be left, the model retrieves {least}.")
                return segments, next_id

            words = [change.words for change in changes]
            action = "; ".join(words[:4]) + (f"; and {len(words) - 4} more" if len(words) > 4 else "")
            return self._edit(action, revise, only_on)

    def add(self, entries: Sequence[NewEntry], encoder: DocumentEncoder, only_on: int | None = None) -> KnowledgeMemory:
        """Append entries; their ids are the next ones. Raises as `edit` does."""
        if not entries:
            raise UserError(f"{self.folder}: nothing to add.")
        return self.edit([Change(entries=tuple(entries))], encoder, only_on)

    def replace(
        self, entry_id: int, entry: NewEntry, encoder: DocumentEncoder, only_on: int | None = None
    ) -> KnowledgeMemory:
        """Replace an entry; the new one keeps its id. Raises as `edit` does."""
        return self.edit([Change((entry_id,), (entry,))], encoder, only_on)

    def delete(self, entry_ids: Sequence[int], only_on: int | None = None) -> KnowledgeMemory:
        """Delete entries; readers of older versions keep them. Raises `UserError` naming an unknown id."""
        return self.edit([Change(tuple(entry_ids))], None, only_on)

    def concat(self, others: Sequence[KnowledgeMemory], only_on: int | None = None) -> KnowledgeMemory:
        """Append the entries of other memories; they get the next ids.

        Raises:
            UserError: encoders, tokenizers or number formats differ.
        """

        def revise(base: Version) -> Revision:
            segments, next_id = list(base.segments), base.next_id
            for other in others:
                take_files(self.folder, base, other.folder, other.manifest)
                segments += [
                    segment.model_copy(update={"id_offset": segment.id_offset + next_id})
                    for segment in other.manifest.segments
                ]
                next_id += other.manifest.next_id
            return tuple(segments), next_id

        return self._edit(f"concat {', '.join(other.name for other in others)}", revise, only_on)

    def swap(self, other: KnowledgeMemory, only_on: int | None = None) -> KnowledgeMemory:
        """Replace this memory's entries by the other's, under their ids.

        `other` may be an older version of the same memory: its entries are restored exactly, even if the current
        version's manifest is damaged. Raises as `concat` does.
        """

        def revise(base: Version) -> Revision:
            take_files(self.folder, base, other.folder, other.manifest)
            return other.manifest.segments, max(base.next_id, other.manifest.next_id)

        older = other.manifest if other.folder.resolve() == self.folder.resolve() else None
        return self._edit(f"swap {other.name}", revise, only_on, fallback=older)

    def refresh(self, encoder: DocumentEncoder, only_on: int | None = None) -> KnowledgeMemory:
        """Encode all documents again, in this process (`refresh.refresh` does it on Ray Data)."""

        def encode(documents: FileInfo) -> FileInfo:
            return encode_segment(self.folder, documents, encoder, self.manifest.dtype)

        return self.with_vectors(encoder, encode, only_on)

    def with_vectors(
        self, encoder: DocumentEncoder, encode: Callable[[FileInfo], FileInfo], only_on: int | None = None
    ) -> KnowledgeMemory:
        """Publish the same documents with other vectors; `encode` makes them from each segment's documents.

        Raises:
            UserError: the tokens were made by another tokenizer.
        """

        def revise(base: Version) -> Revision:
            require_tokenizer(self.folder, base, encoder)
            return tuple(s.model_copy(update={"vectors": encode(s.documents)}) for s in base.segments), base.next_id

        return self._edit("refresh", revise, only_on, _encoder_fields(encoder))

    # ── reading ─────────────────────────────────────────────────────────────

    @property
    def name(self) -> str:
        return f"{self.folder.name} version {self.version}"

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the encoder of its keys and values."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.manifest.entries

    def load(
        self,
        fingerprint: str | None = None,
        tags: Sequence[str] = (),
        without_tags: Sequence[str] = (),
        sources: Sequence[str] = (),
        part: tuple[int, int] = (0, 1),
    ) -> LocalKnowledge:
        """Load keys, values and tokens into this process, for `model.attach`.

        Args:
            fingerprint: of the model (`model.fingerprint()`); None: any.
            tags, sources: only entries with one of these tags, of one of these sources.
            without_tags: no entries with one of these tags.
            part: (i, n): the i-th of n equal parts, in the order of ids.

        Raises:
            StaleKeys: the memory was made by another encoder.
            UserError: a file is missing or damaged.
        """
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise StaleKeys(self.name, self.manifest.encoder_label, fingerprint)
        selected = EntryFilter(frozenset(tags), frozenset(without_tags), frozenset(sources), part)
        return load_entries(self.folder, self.manifest, self.name, selected)

    def table(self, columns: Sequence[str]) -> pa.Table:
        """`entry_id` and columns of `entries.SCHEMA`, of all entries in the order of their ids."""
        names = list(dict.fromkeys(["entry_id", *columns]))
        parts = [self._rows(segment, names) for segment in self.manifest.segments]
        return pa.concat_tables(parts).sort_by("entry_id") if parts else pa.table({name: [] for name in names})

    def entries(self, entry_ids: Sequence[int] | None = None) -> Iterator[Entry]:
        """All entries in the order of their ids, or the given ones in the given order.

        Raises:
            UserError: an id is unknown.
        """
        if entry_ids is None:
            yield from map(_entry, self.table(ENTRY_COLUMNS).to_pylist())
            return
        entries = {}
        for index, rows in rows_of(self.folder, self.manifest, entry_ids).items():
            segment = self.manifest.segments[index]
            table = read_documents(self.folder, segment.documents, ENTRY_COLUMNS).take(rows)
            for row in table.to_pylist():
                entry = _entry({**row, "entry_id": row["entry_id"] + segment.id_offset})
                entries[entry.entry_id] = entry
        yield from (entries[entry_id] for entry_id in entry_ids)

    def history(self) -> Iterator[Version]:
        """All versions that were not pruned and are not damaged, the oldest first."""
        return versions.sound(self.folder)

    def verify(self, on_file: Callable[[str], None] = lambda name: None) -> list[str]:
        """Read every byte of this version; returns its faults, in words."""
        problems = []
        for info in self.manifest.files.values():
            path = self.folder / info.name
            if not path.exists():
                problems.append(f"{path}: missing")
            elif sha256_of(path) != info.sha256:
                problems.append(f"{path}: damaged (its checksum is not the version's)")
            on_file(info.name)
        if problems:
            return problems
        ids = self.table([])["entry_id"].to_numpy()
        if len(np.unique(ids)) != len(ids):
            problems.append(f"{self.folder}: an entry id is given twice")
        for segment in self.manifest.segments:
            key_NQ, value_ND = read_vectors(self.folder, segment.vectors)
            if not (len(key_NQ) == len(value_ND) == segment.rows):
                problems.append(f"{self.folder / segment.vectors.name}: {len(key_NQ)} keys of {segment.rows} entries")
            if not bool(key_NQ.isfinite().all() and value_ND.isfinite().all()):
                problems.append(f"{self.folder / segment.vectors.name}: a number that is not finite")
        return problems

    @staticmethod
    def prune(folder: Path | str, keep: Sequence[int] = ()) -> list[int]:
        """Delete all versions but these and the current one, and files that only they need; returns their numbers.

        Waits for running edits: they may reuse files that only older versions have.
        """
        folder = Path(folder)
        versions.read(folder)  # raises if there is none
        with versions.lock(folder, exclusive=True):
            kept, pruned = {versions.read(folder).version, *keep}, []
            needed: set[str] = set()
            unneeded: set[str] = set()
            for version in versions.sound(folder):
                if version.version in kept:
                    needed |= set(version.files)
                else:
                    unneeded |= set(version.files)
                    versions.forget(folder, version.version)
                    pruned.append(version.version)
            for name in unneeded - needed:
                (folder / name).unlink(missing_ok=True)
        return pruned

    # ── inside ──────────────────────────────────────────────────────────────

    def _edit(
        self,
        action: str,
        revise: Callable[[Version], Revision],
        only_on: int | None,
        fields: dict[str, Any] | None = None,
        fallback: Version | None = None,
    ) -> KnowledgeMemory:
        return KnowledgeMemory(self.folder, publish_on_current(self.folder, action, revise, only_on, fields, fallback))

    def _rows(self, segment: Segment, columns: list[str]) -> pa.Table:
        """The segment's entries in this version, with their ids; `entry_id` comes first."""
        table = read_documents(self.folder, segment.documents, columns)
        ids = pa.array(table["entry_id"].to_numpy() + segment.id_offset)
        table = table.set_column(0, "entry_id", ids)
        if segment.dropped:
            table = table.take(np.setdiff1d(np.arange(segment.rows), segment.dropped))
        return table


def _encoder_fields(encoder: DocumentEncoder) -> dict[str, Any]:
    """A manifest's fields of its encoder."""
    Q, D = encoder.sizes
    return {"encoder": encoder.name, "fingerprint": encoder.fingerprint, "query_size": Q, "hidden_size": D}


def _entry(row: dict[str, Any]) -> Entry:
    return Entry(**{**row, "tags": tuple(row["tags"]), "token_ids": tuple(row["token_ids"])})
