"""A prepared split as one stream of tokens, cut into segments. Knows numpy and the shards' Parquet, no Ray.

Shapes: T tokens of the split, D documents, S segments, B segments of a batch, L tokens of a segment.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError

PADDING = -1


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a split, document after document."""

    token_T: np.ndarray
    """int32."""
    start_D: np.ndarray
    """Where each document begins; int64, the first is 0."""
    eos_id: int
    titles: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_T)

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenStream:
        """The stream of `<run>/prepare`; raises `UserError` if the split or a shard is missing."""
        try:
            corpus = json.loads((folder / "corpus.json").read_text())[split]
            words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            eos = words["tokens"].index(words["eos"])
        except (OSError, ValueError, KeyError):
            raise UserError(f"{folder}: no prepared split '{split}'. Run: pema-ray trime prepare") from None
        parts, lengths, titles = [], [], []
        for shard in corpus["shards"]:
            path = folder / split / shard["name"]
            try:
                table = pq.read_table(path, memory_map=True)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]} Prepare again.") from None
            for chunk in table.column("token").chunks:
                parts.append(chunk.flatten().to_numpy(zero_copy_only=False))
                lengths.append(chunk.value_lengths().to_numpy(zero_copy_only=False))
            titles += table.column("title").to_pylist()
        length_D = np.concatenate(lengths).astype(np.int64)
        start_D = np.concatenate([[0], np.cumsum(length_D)[:-1]]).astype(np.int64)
        return cls(np.concatenate(parts).astype(np.int32, copy=False), start_D, eos, tuple(titles))


class SegmentBatch(NamedTuple):
    """Segments as input of a model; int64 `[B, L]`."""

    input_BL: np.ndarray
    """Position t holds the token before its label; `<eos>` before the first of the split."""
    label_BL: np.ndarray
    """The next token; -1 after the end of the split."""
    document_BL: np.ndarray
    """Number of the label's document."""
    segment_BL: np.ndarray
    """Number of the segment in the batch."""


@dataclass(frozen=True)
class Segments:
    """Segment s is the tokens [s·L, s·L + L); the last one may be shorter."""

    stream: TokenStream
    length: int

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def tokens(self, number: int) -> np.ndarray:
        """The tokens of one segment, without padding."""
        return self.stream.token_T[number * self.length : (number + 1) * self.length]

    def batch(self, numbers: Sequence[int] | np.ndarray, first: int = 0) -> SegmentBatch:
        """Segments by number, in this order; `first` is the place of the first one in a larger batch."""
        position_BL = np.asarray(numbers, np.int64)[:, None] * self.length + np.arange(self.length)
        inside_BL = position_BL < len(self.stream)
        position_BL = np.where(inside_BL, position_BL, 0)
        label_BL = np.where(inside_BL, self.stream.token_T[position_BL], PADDING).astype(np.int64)
        before_BL = np.where(position_BL > 0, self.stream.token_T[position_BL - 1], self.stream.eos_id)
        input_BL = np.where(inside_BL, before_BL, self.stream.eos_id).astype(np.int64)
        document_BL = np.searchsorted(self.stream.start_D, position_BL, side="right") - 1
        segment_BL = np.repeat(np.arange(first, first + len(position_BL))[:, None], self.length, 1)
        return SegmentBatch(input_BL, label_BL, document_BL, segment_BL)

    def none(self) -> SegmentBatch:
        """A batch of one segment of padding, for a worker that has none."""
        full = np.zeros((1, self.length), np.int64)
        return SegmentBatch(full + self.stream.eos_id, full + PADDING, full, full)
