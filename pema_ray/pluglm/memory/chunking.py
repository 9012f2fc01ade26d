"""Cuts texts into pieces that fit a model. Imports no torch and no Ray, so that its tasks start fast."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from pema_ray.pluglm.config import TextConfig

_SCHEMA = pa.schema(
    {"text": pa.string(), "token_ids": pa.list_(pa.int32()), "document_id": pa.string(), "source": pa.string()}
)


def chunk(table: pa.Table, config: TextConfig, tokenizer: Any, max_tokens: int) -> pa.Table:
    """Pieces of at most `max_tokens` tokens, each with its part of the text; blank texts are dropped."""
    texts = _strings(table, config.text_column)
    ids = _strings(table, config.document_column) if config.document_column else [_content_id(text) for text in texts]
    sources = _strings(table, config.source_column) if config.source_column else [config.source] * len(texts)
    rows = [row for row, text in enumerate(texts) if text.strip()]
    pieces = []
    if rows:
        encoded = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=max_tokens, return_overflowing_tokens=True,
            return_offsets_mapping=True, return_special_tokens_mask=True,
        )  # fmt: skip
        for piece, token_ids in enumerate(encoded["input_ids"]):
            row = rows[encoded["overflow_to_sample_mapping"][piece]]
            offsets = zip(encoded["offset_mapping"][piece], encoded["special_tokens_mask"][piece])
            if spans := [span for span, special in offsets if not special]:
                text = texts[row][spans[0][0] : spans[-1][1]]
                pieces.append((text, token_ids, ids[row], sources[row]))
    return pa.Table.from_pylist([dict(zip(_SCHEMA.names, piece)) for piece in pieces], _SCHEMA)


def _strings(table: pa.Table, column: str) -> list[str]:
    return ["" if value is None else str(value) for value in table[column].to_pylist()]


def _content_id(text: str) -> str:
    """The id of a document that has none: a hash of its text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
