"""Reads entries of a version from disk into tensors. Imports no Ray.

Shapes: N entries, Q query size, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from pema_ray.pluglm.memory.entries import Segment, read_documents, read_vectors
from pema_ray.pluglm.memory.versions import Version
from pema_ray.pluglm.model.knowledge import LocalKnowledge
from pema_ray.runtime.hardware import DTYPES

pc: Any = pyarrow.compute  # generated at run time: type checkers do not know its functions


@dataclass(frozen=True)
class EntryFilter:
    """Selects entries; `part` (i, n) is the i-th of n equal parts, in the order of ids, of the otherwise selected."""

    tags: frozenset[str] = frozenset()
    without_tags: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    part: tuple[int, int] = (0, 1)


def load_entries(folder: Path, version: Version, name: str, selected: EntryFilter) -> LocalKnowledge:
    """The selected entries of a version, in the order of their ids."""
    ids, rows = [], []
    for segment in version.segments:
        row = _selected_rows(folder, segment, selected)
        segment_ids = read_documents(folder, segment.documents, ["entry_id"])["entry_id"].to_numpy()
        ids.append(segment_ids[row] + segment.id_offset)
        rows.append(row)
    segment_N = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    entry_N, row_N = np.concatenate([[], *ids]).astype(np.int64), np.concatenate([[], *rows]).astype(np.int64)
    order = np.argsort(entry_N, kind="stable")
    i, n = selected.part
    order = order[len(order) * i // n : len(order) * (i + 1) // n]
    return _read(folder, version, name, entry_N[order], segment_N[order], row_N[order])


def _selected_rows(folder: Path, segment: Segment, selected: EntryFilter) -> np.ndarray:
    """Rows of a segment that this version has and the filter selects."""
    mask = np.ones(segment.rows, bool)
    mask[list(segment.dropped)] = False
    if selected.sources:
        source = read_documents(folder, segment.documents, ["source"])["source"]
        mask &= pc.is_in(source, value_set=pa.array(sorted(selected.sources))).to_numpy(zero_copy_only=False)
    if selected.tags or selected.without_tags:
        tags_of_rows = read_documents(folder, segment.documents, ["tags"])["tags"].to_pylist()
        if selected.tags:
            mask &= [not selected.tags.isdisjoint(tags) for tags in tags_of_rows]
        mask &= [selected.without_tags.isdisjoint(tags) for tags in tags_of_rows]
    return np.flatnonzero(mask)


def _read(
    folder: Path, version: Version, name: str, entry_N: np.ndarray, segment_N: np.ndarray, row_N: np.ndarray
) -> LocalKnowledge:
    """Rows `row_N` of segments `segment_N`."""
    N, dtype = len(entry_N), DTYPES[version.dtype]
    key_NQ = torch.empty(N, version.query_size, dtype=dtype)
    value_ND = torch.empty(N, version.hidden_size, dtype=dtype)
    document_N = np.zeros(N, np.int64)
    length_N = np.zeros(N, np.int64)
    token_lists: list[tuple[np.ndarray, pa.ChunkedArray]] = []
    for index in np.unique(segment_N):
        segment, place = version.segments[index], np.flatnonzero(segment_N == index)
        row = row_N[place]
        key, value = read_vectors(folder, segment.vectors)
        key_NQ[torch.from_numpy(place)], value_ND[torch.from_numpy(place)] = key[row], value[row]
        table = read_documents(folder, segment.documents, ["document", "token_ids"]).take(row)
        document_N[place] = table["document"].to_numpy()
        length_N[place] = pc.list_value_length(table["token_ids"]).to_numpy()
        token_lists.append((place, table["token_ids"]))
    end_N = length_N.cumsum()
    token = np.zeros(int(end_N[-1]) if N else 0, np.int32)
    for place, token_ids in token_lists:
        flat = token_ids.combine_chunks().flatten().to_numpy()
        length = length_N[place]
        before = length.cumsum() - length
        begin = end_N[place] - length
        token[np.arange(len(flat)) + np.repeat(begin - before, length)] = flat
    return LocalKnowledge(
        name, version.version, version.fingerprint, torch.from_numpy(entry_N), torch.from_numpy(document_N),
        key_NQ, value_ND, torch.from_numpy(token), torch.from_numpy(end_N),
    )  # fmt: skip
