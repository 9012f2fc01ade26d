"""Builds or refreshes a memory on Ray Data. One segment is one task: the bytes are the same for any number of actors.

An interrupted job's files are reused; the new version is published last, atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.pluglm.config import TextConfig
from pema_ray.pluglm.learning.text import content_hash, has_plan, pieces, write_plan
from pema_ray.pluglm.memory.editing import encode_segment, require_new
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import (
    FileInfo,
    NewEntry,
    Segment,
    are_sound_vectors,
    described,
    vectors_path,
    write_documents,
)
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.runtime.hardware import set_threads

Done = Callable[[int], None]
"""Receives the number of segments just encoded."""


def build(
    folder: Path | str,
    documents: TextConfig,
    encoder: DocumentEncoder,
    dtype: str = "float16",
    entries_per_segment: int = 4096,
    workers: int = 1,
    cpus: float = 1,
    on_done: Done = lambda number: None,
) -> KnowledgeMemory:
    """Version 1 of a memory of documents in files; long documents become several entries.

    Args:
        workers: encoding actors; 0: this process encodes.
        cpus: CPUs of each actor.

    Raises:
        UserError: files cannot be read, hold no text, or the folder holds a memory.
    """
    folder = Path(folder)
    require_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts, next_id = [], 0
    for table in pieces(documents, encoder.tokenizer, encoder.max_tokens, entries_per_segment):
        rows = table.drop_columns(["token_ids"]).to_pylist()
        entries = [NewEntry(**row) for row in rows]
        info = write_documents(folder, entries, table["token_ids"].to_pylist(), range(len(entries)))
        parts.append((info, len(entries), next_id))
        next_id += len(entries)
    vectors = _encode(folder, [info for info, _, _ in parts], encoder, dtype, workers, cpus, on_done)
    segments = [
        Segment(documents=info, vectors=encoded, rows=rows, first_id=0, last_id=rows - 1, id_offset=offset)
        for (info, rows, offset), encoded in zip(parts, vectors)
    ]
    memory = KnowledgeMemory.first(folder, segments, encoder, dtype, f"build {next_id:,}")
    write_plan(folder, _key(documents, encoder, dtype, entries_per_segment))
    return memory


def is_built_from(
    folder: Path, documents: TextConfig, encoder: DocumentEncoder, dtype: str, entries_per_segment: int
) -> bool:
    """Whether `build` made this memory from these documents, even if another encoder has refreshed it since."""
    return has_plan(folder, _key(documents, encoder, dtype, entries_per_segment))


def _key(documents: TextConfig, encoder: DocumentEncoder, dtype: str, entries_per_segment: int) -> str:
    return content_hash(documents, encoder.tokenizer_fingerprint, encoder.max_tokens, dtype, entries_per_segment)


def refresh(
    memory: KnowledgeMemory,
    encoder: DocumentEncoder,
    workers: int = 1,
    cpus: float = 1,
    only_on: int | None = None,
    on_done: Done = lambda number: None,
) -> KnowledgeMemory:
    """Encode all documents again and publish the next version; arguments as of `build` and of the edits."""
    dtype = memory.manifest.dtype
    vectors: dict[str, FileInfo] = {}

    def encode(documents: FileInfo) -> FileInfo:
        if documents.name not in vectors:  # the first call, or a segment that another editor published meanwhile
            newest = KnowledgeMemory.open(memory.folder).manifest.segments
            infos = {segment.documents.name: segment.documents for segment in newest} | {documents.name: documents}
            todo = [info for name, info in infos.items() if name not in vectors]
            encoded = _encode(memory.folder, todo, encoder, dtype, workers, cpus, on_done)
            vectors.update(zip([info.name for info in todo], encoded))
        return vectors[documents.name]

    return memory.with_vectors(encoder, encode, only_on)


def _encode(
    folder: Path,
    documents: Sequence[FileInfo],
    encoder: DocumentEncoder,
    dtype: str,
    workers: int,
    cpus: float,
    on_done: Done,
) -> list[FileInfo]:
    """Vectors of segments' documents, in order; existing undamaged files are reused."""
    paths = {info.name: vectors_path(folder, info, encoder.digest, dtype) for info in documents}
    todo = [info for info in documents if not are_sound_vectors(paths[info.name])]
    if workers and todo:
        _encode_on_ray(folder, todo, encoder, dtype, workers, cpus, on_done)
    else:
        for info in todo:
            encode_segment(folder, info, encoder, dtype)
            on_done(1)
    return [described(paths[info.name]) for info in documents]


def _encode_on_ray(
    folder: Path,
    todo: Sequence[FileInfo],
    encoder: DocumentEncoder,
    dtype: str,
    workers: int,
    cpus: float,
    on_done: Done,
) -> None:
    import ray

    encoder_ref = [ray.put(encoder.copied())]  # in a list: a bare reference would be fetched for every task
    items = ray.data.from_items([{"documents": info.model_dump_json()} for info in todo], override_num_blocks=len(todo))
    results: Any = items.map_batches(
        _SegmentEncoder,
        fn_constructor_args=(str(folder.resolve()), encoder_ref, dtype, max(1, int(cpus))),
        batch_size=1,
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
    )
    for row in results.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        on_done(1)


class _SegmentEncoder:
    """Encodes one segment per call."""

    def __init__(self, folder: str, encoder_ref: list[Any], dtype: str, threads: int) -> None:
        import ray

        set_threads(threads)
        self._folder, self._dtype = Path(folder), dtype
        self._encoder: DocumentEncoder = ray.get(encoder_ref[0])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        info = FileInfo.model_validate_json(str(batch["documents"][0]))
        try:
            encode_segment(self._folder, info, self._encoder, self._dtype)
            return {"error": [""]}
        except UserError as error:
            return {"error": [str(error)]}
