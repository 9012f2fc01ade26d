"""Cuts texts into pieces that a model can read. Imports no torch and no Ray: its tasks should begin fast."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa

from pema_ray.pluglm.config import TextConfig


class Cutter:
    """Tokenizes a batch of rows and cuts what is too long; knows which characters a piece stands for."""

    def __init__(self, texts: TextConfig, tokenizer: Any, most: int) -> None:
        self._texts, self._tokenizer, self._most = texts, tokenizer, most

    def __call__(self, table: pa.Table) -> pa.Table:
        t = self._texts
        texts = ["" if one is None else str(one) for one in table[t.text_column].to_pylist()]
        kept = [n for n, one in enumerate(texts) if one.strip()]
        ids = self._column(table, t.document_column) or [_name(one) for one in texts]
        sources = self._column(table, t.source_column) or [t.source] * len(texts)
        columns: dict[str, list[Any]] = {"text": [], "token_ids": [], "document_id": [], "source": []}
        if kept:
            cut = self._tokenizer(
                [texts[n] for n in kept],
                truncation=True,
                max_length=self._most,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            for piece, token_ids in enumerate(cut["input_ids"]):
                n = kept[cut["overflow_to_sample_mapping"][piece]]
                spans = [
                    s for s, one in zip(cut["offset_mapping"][piece], cut["special_tokens_mask"][piece]) if not one
                ]
                if not spans:
                    continue
                columns["text"].append(texts[n][spans[0][0] : spans[-1][1]])
                columns["token_ids"].append(token_ids)
                columns["document_id"].append(ids[n])
                columns["source"].append(sources[n])
        kinds = (pa.string(), pa.list_(pa.int32()), pa.string(), pa.string())
        return pa.table({name: pa.array(values, kind) for (name, values), kind in zip(columns.items(), kinds)})

    @staticmethod
    def _column(table: pa.Table, name: str | None) -> list[str] | None:
        return None if name is None else ["" if one is None else str(one) for one in table[name].to_pylist()]


def _name(text: str) -> str:
    """A document without a name is called by what it says."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
