"""The memory on disk, as a thing to edit. Every edit publishes a new version, atomically; versions never change.

`KnowledgeMemory` is one version; edits return the next. Several editors at once: each publishes on top of the version
that is current then, so that nothing is lost; of two edits of one entry the later version's holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pema_ray.pluglm.encoding import DocumentEncoder
from pema_ray.pluglm.entries import Entry, NewEntry
from pema_ray.pluglm.knowledge import HeldKnowledge

VectorDtype = Literal["float32", "float16", "bfloat16"]


class KnowledgeMemory:
    """One version of a memory. Opened, it stays readable until that version is pruned."""

    @classmethod
    def open(cls, folder: Path | str, version: int | None = None) -> KnowledgeMemory:
        """A version; by default the current one. Raises `UserError` where there is no memory or no such version."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        folder: Path | str,
        entries: Iterable[NewEntry],
        encoder: DocumentEncoder,
        dtype: VectorDtype = "float16",
        entries_per_segment: int = 4096,
    ) -> KnowledgeMemory:
        """Version 1 of a new memory. Raises `UserError`: no entries, or a memory is there."""
        raise NotImplementedError

    # ── edits: each returns the new version ─────────────────────────────────

    def add(self, entries: Sequence[NewEntry], encoder: DocumentEncoder) -> KnowledgeMemory:
        """Put entries behind those that are there; their ids are the next ones."""
        raise NotImplementedError

    def replace(self, entry_id: int, entry: NewEntry, encoder: DocumentEncoder) -> KnowledgeMemory:
        """Put an entry in an existing one's place, under its id. Raises `UserError` if it is gone."""
        raise NotImplementedError

    def delete(self, entry_ids: Sequence[int]) -> KnowledgeMemory:
        """Raises `UserError` naming an entry that is gone."""
        raise NotImplementedError

    def concat(self, others: Sequence[KnowledgeMemory]) -> KnowledgeMemory:
        """This memory's entries and then the others', whose ids are counted on. Same encoder and number format."""
        raise NotImplementedError

    def swap(self, other: KnowledgeMemory) -> KnowledgeMemory:
        """The other memory's entries, under their ids, instead of this one's. Swapping back restores them exactly."""
        raise NotImplementedError

    def refresh(self, encoder: DocumentEncoder) -> KnowledgeMemory:
        """All documents encoded anew, in this process (`refresh.refresh` does it on Ray Data)."""
        raise NotImplementedError

    # ── reading ─────────────────────────────────────────────────────────────

    @property
    def version(self) -> int:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Of the encoder of its keys and values."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def load(
        self,
        fingerprint: str | None = None,
        tags: Sequence[str] = (),
        without_tags: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> HeldKnowledge:
        """Keys, values and tokens in this process, to be attached to a model.

        Args:
            fingerprint: what the model reads (`model.fingerprint()`); None: whatever it is.
            tags, sources: only entries with one of these tags, of one of these sources.
            without_tags: no entries with one of these tags.

        Raises:
            StaleKeys: the memory was made by another encoder.
            UserError: a file is missing or damaged.
        """
        raise NotImplementedError

    def entries(self, entry_ids: Sequence[int] | None = None) -> Iterator[Entry]:
        """Entries in the order of their ids, or those asked for in that order."""
        raise NotImplementedError

    def verify(self, on_file: Callable[[str], None] = lambda name: None) -> list[str]:
        """Reads every byte; what is wrong, in words."""
        raise NotImplementedError

    @staticmethod
    def prune(folder: Path | str, keep: Sequence[int]) -> list[int]:
        """Take away versions but these and the current one, and files that no version left needs."""
        raise NotImplementedError
