"""Builds a memory, or encodes one anew, on Ray Data: one segment is one task, so that no number of actors ever changes
a bit. What an undone job has left is used; the new version is published last, whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.pluglm.config import TextConfig
from pema_ray.pluglm.learning.text import content_hash, pieces
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
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.hardware import set_threads

_PLAN = "plan.json"
Done = Callable[[int], None]
"""Is told how many segments have been encoded."""


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
    """Version 1 of a memory of documents in files; a document that is too long becomes several entries.

    Args:
        workers: encoding actors; 0: this process encodes.
        cpus: that each actor asks of Ray.

    Raises:
        UserError: files cannot be read, hold no text, or a memory is there already.
    """
    folder = Path(folder)
    require_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts, entry = [], 0
    for table in pieces(documents, encoder.tokenizer, encoder.max_tokens, entries_per_segment):
        rows = table.drop_columns(["token_ids"]).to_pylist()
        entries = [NewEntry(**row) for row in rows]
        info = write_documents(folder, entries, table["token_ids"].to_pylist(), range(len(entries)))
        parts.append((info, len(entries), entry))
        entry += len(entries)
    vectors = encode(folder, [info for info, _, _ in parts], encoder, dtype, workers, cpus, on_done)
    segments = [
        Segment(documents=info, vectors=made, rows=rows, first_id=0, last_id=rows - 1, id_offset=offset)
        for (info, rows, offset), made in zip(parts, vectors)
    ]
    memory = KnowledgeMemory.first(folder, segments, encoder, dtype, f"build {entry:,}")
    with atomic_file(folder / _PLAN) as temporary:
        temporary.write_text(json.dumps({"key": _key(documents, encoder, dtype, entries_per_segment)}) + "\n")
    return memory


def is_built_from(
    folder: Path, documents: TextConfig, encoder: DocumentEncoder, dtype: str, entries_per_segment: int
) -> bool:
    """Whether `build` made this memory of these very documents, whatever encoder has encoded them since."""
    plan = folder / _PLAN
    if not plan.exists():
        return False
    return json.loads(plan.read_text())["key"] == _key(documents, encoder, dtype, entries_per_segment)


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
    """Encode all documents anew and publish that as the next version; arguments as `build`'s and the edits'."""
    dtype = memory.manifest.dtype
    made: dict[str, FileInfo] = {}

    def encoded(documents: FileInfo) -> FileInfo:
        if documents.name not in made:  # also: another editor's segment, when this version has to be made again
            newest = KnowledgeMemory.open(memory.folder).manifest.segments
            wanted = {segment.documents.name: segment.documents for segment in newest} | {documents.name: documents}
            left = [info for name, info in wanted.items() if name not in made]
            made.update(
                zip([i.name for i in left], encode(memory.folder, left, encoder, dtype, workers, cpus, on_done))
            )
        return made[documents.name]

    return memory.with_vectors(encoder, encoded, only_on)


def encode(
    folder: Path,
    documents: Sequence[FileInfo],
    encoder: DocumentEncoder,
    dtype: str,
    workers: int = 1,
    cpus: float = 1,
    on_done: Done = lambda number: None,
) -> list[FileInfo]:
    """Vectors of segments' documents, in order; those that are there already, undamaged, are not made again."""
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

    shipped = [ray.put(encoder.copied())]  # in a list: a bare reference would be fetched for every task
    items = ray.data.from_items([{"documents": info.model_dump_json()} for info in todo], override_num_blocks=len(todo))
    done: Any = items.map_batches(
        _SegmentEncoder,
        fn_constructor_args=(str(folder.resolve()), shipped, dtype, max(1, int(cpus))),
        batch_size=1,
        num_cpus=cpus,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
    )
    for row in done.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        on_done(1)


class _SegmentEncoder:
    """Encodes one segment a call."""

    def __init__(self, folder: str, shipped: list[Any], dtype: str, threads: int) -> None:
        import ray

        set_threads(threads)
        self._folder, self._dtype = Path(folder), dtype
        self._encoder: DocumentEncoder = ray.get(shipped[0])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        info = FileInfo.model_validate_json(str(batch["documents"][0]))
        try:
            encode_segment(self._folder, info, self._encoder, self._dtype)
            return {"error": [""]}
        except UserError as error:
            return {"error": [str(error)]}
