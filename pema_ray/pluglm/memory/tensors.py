"""Reads a version, or a part of it, from disk into tensors. Imports no Ray.

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

pc: Any = pyarrow.compute  # made at run time, so that no type checker knows its functions


@dataclass(frozen=True)
class Choice:
    """Which entries; `part` (i, n) is the i-th of n equal parts of what the others leave, in the order of ids."""

    tags: frozenset[str] = frozenset()
    without_tags: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    part: tuple[int, int] = (0, 1)


def hold(folder: Path, version: Version, name: str, choice: Choice) -> LocalKnowledge:
    """The chosen entries of a version, in the order of their ids."""
    ids, rows = [], []
    for segment in version.segments:
        row = _chosen(folder, segment, choice)
        numbers = read_documents(folder, segment.documents, ["entry_id"])["entry_id"].to_numpy()
        ids.append(numbers[row] + segment.id_offset)
        rows.append(row)
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    everything, row = np.concatenate([[], *ids]).astype(np.int64), np.concatenate([[], *rows]).astype(np.int64)
    order = np.argsort(everything, kind="stable")
    i, n = choice.part
    order = order[len(order) * i // n : len(order) * (i + 1) // n]
    return _read(folder, version, name, everything[order], owner[order], row[order])


def _chosen(folder: Path, segment: Segment, choice: Choice) -> np.ndarray:
    """Rows of a segment that are there and wanted."""
    wanted = np.ones(segment.rows, bool)
    wanted[list(segment.dropped)] = False
    if choice.sources:
        source = read_documents(folder, segment.documents, ["source"])["source"]
        wanted &= pc.is_in(source, value_set=pa.array(sorted(choice.sources))).to_numpy(zero_copy_only=False)
    if choice.tags or choice.without_tags:
        tags = [set(one) for one in read_documents(folder, segment.documents, ["tags"])["tags"].to_pylist()]
        if choice.tags:
            wanted &= [bool(one & choice.tags) for one in tags]
        wanted &= [not one & choice.without_tags for one in tags]
    return np.flatnonzero(wanted)


def _read(
    folder: Path, version: Version, name: str, entry_N: np.ndarray, owner_N: np.ndarray, row_N: np.ndarray
) -> LocalKnowledge:
    """Rows `row_N` of segments `owner_N`."""
    N, dtype = len(entry_N), DTYPES[version.dtype]
    key_NQ = torch.empty(N, version.query_size, dtype=dtype)
    value_ND = torch.empty(N, version.hidden_size, dtype=dtype)
    document_N = np.zeros(N, np.int64)
    length_N = np.zeros(N, np.int64)
    taken: dict[int, tuple[np.ndarray, pa.Table]] = {}
    for index in np.unique(owner_N):
        segment, place = version.segments[index], np.flatnonzero(owner_N == index)
        row = row_N[place]
        key, value = read_vectors(folder, segment.vectors)
        key_NQ[torch.from_numpy(place)], value_ND[torch.from_numpy(place)] = key[row], value[row]
        table = read_documents(folder, segment.documents, ["document", "token_ids"]).take(row)
        document_N[place] = table["document"].to_numpy()
        length_N[place] = pc.list_value_length(table["token_ids"]).to_numpy()
        taken[index] = place, table
    end_N = length_N.cumsum()
    token = np.zeros(int(end_N[-1]) if N else 0, np.int32)
    for place, table in taken.values():
        flat = table["token_ids"].combine_chunks().flatten().to_numpy()
        length = length_N[place]
        before = length.cumsum() - length
        begin = end_N[place] - length
        token[np.arange(len(flat)) + np.repeat(begin - before, length)] = flat
    return LocalKnowledge(
        name, version.version, version.fingerprint, torch.from_numpy(entry_N), torch.from_numpy(document_N),
        key_NQ, value_ND, torch.from_numpy(token), torch.from_numpy(end_N),
    )  # fmt: skip
