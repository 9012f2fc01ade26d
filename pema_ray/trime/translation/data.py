"""Parallel text: where pairs come from, their subwords, and the ids kept as Parquet. Knows `tokenizers` and no model.

Of `BytePairs`, on both sides, id 0 ends a sentence (`<eos>`), and id 1 (`<pad>`) pads it and begins it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import Split
from pema_ray.trime.model.registry import TRANSFORMERS
from pema_ray.trime.text.corpus import SPLITS
from pema_ray.trime.text.vocabulary import train_tokenizer
from pema_ray.trime.translation.config import MtDataConfig

EOS, PAD = "<eos>", "<pad>"
Pair = tuple[str, str]
"""(source, target)."""


class Subwords(Protocol):
    """Text of both sides to ids and back; the ids lack the end of a sentence."""

    source_words: int
    target_words: int
    eos: int

    def source(self, texts: Sequence[str]) -> list[list[int]]: ...

    def target(self, texts: Sequence[str]) -> list[list[int]]: ...

    def text(self, ids: Sequence[int]) -> str:
        """Of the target."""
        ...


class BytePairs:
    """A byte-level BPE for each side, made from the training split."""

    eos = 0

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self.source_words, self.target_words = source.get_vocab_size(), target.get_vocab_size()

    @classmethod
    def train(cls, pairs: Sequence[Pair], config: MtDataConfig) -> BytePairs:
        sizes = (config.source_subwords, config.target_subwords)
        texts = ((source for source, _ in pairs), (target for _, target in pairs))
        return cls(*(train_tokenizer(side, size, [EOS, PAD], True) for side, size in zip(texts, sizes)))

    @classmethod
    def load(cls, folder: Path) -> BytePairs:
        from tokenizers import Tokenizer

        return cls(*(Tokenizer.from_file(str(folder / f"{side}.json")) for side in ("source", "target")))

    def save(self, folder: Path) -> None:
        for side, raw in (("source", self._source), ("target", self._target)):
            with atomic_file(folder / f"{side}.json") as temporary:
                temporary.write_text(raw.to_str(), encoding="utf-8")

    def source(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._source.encode_batch(list(texts))]

    def target(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._target.encode_batch(list(texts))]

    def text(self, ids: Sequence[int]) -> str:
        return self._target.decode(list(ids)).strip()


class PretrainedSubwords:
    """The tokenizer of a checkpoint; its final `<eos>` is removed from the ids."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name.removeprefix(TRANSFORMERS))
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.name={name}: its tokenizer cannot be loaded: {reason}") from None
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"model.name={name}: its tokenizer has no token that ends a sentence.")
        self.eos = int(self._tokenizer.eos_token_id)
        self.source_words = self.target_words = len(self._tokenizer)

    def source(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._bare(ids) for ids in self._tokenizer(list(texts)).input_ids]

    def target(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._bare(ids) for ids in self._tokenizer(text_target=list(texts)).input_ids]

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _bare(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.eos else ids


def load_subwords(folder: Path, model_name: str) -> Subwords:
    """The subwords that encoded a run's text."""
    return PretrainedSubwords(model_name) if model_name.startswith(TRANSFORMERS) else BytePairs.load(folder)


# ── encoded pairs ───────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Parallel:
    """Pairs of a split as ids, and the reference texts. S sentences."""

    source: list[list[int]]
    target: list[list[int]]
    reference: list[str]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def length(self) -> int:
        """Mean target length, rounded."""
        return round(sum(map(len, self.target)) / max(1, len(self)))

    def tokens(self, number: int) -> list[int]:
        """A target's ids: what BM25 compares."""
        return self.target[number]

    def save(self, path: Path) -> None:
        columns = {
            "source": pa.array(self.source, pa.list_(pa.int32())),
            "target": pa.array(self.target, pa.list_(pa.int32())),
            "reference": pa.array(self.reference, pa.string()),
        }
        with atomic_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)

    @classmethod
    def load(cls, folder: Path, split: str) -> Parallel:
        """A prepared split.

        Raises:
            UserError: it is not there.
        """
        path = folder / f"{split}.parquet"
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read: {reason} Run: pema-ray trime mt-train") from None
        return cls(*(table.column(name).to_pylist() for name in ("source", "target", "reference")))

    def first(self, count: int) -> Parallel:
        return Parallel(self.source[:count], self.target[:count], self.reference[:count])


def prepare(config: MtDataConfig, model_name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Read the pairs, make the subwords, and write `<split>.parquet`; returns the counts.

    Raises:
        UserError: a file is missing or broken, sides do not match, a split is empty, or a held-out pair is too long.
    """
    pairs = {split: _limited(part, config.limits.get(split), seed) for split, part in read_pairs(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if model_name.startswith(TRANSFORMERS):
        subwords: Subwords = PretrainedSubwords(model_name)
    else:
        subwords = BytePairs.train(pairs["train"], config)
        subwords.save(folder)
    counts: dict[str, Any] = {"source_words": subwords.source_words, "target_words": subwords.target_words}
    for split, part in pairs.items():
        sources, targets = [source for source, _ in part], [target for _, target in part]
        encoded = Parallel(subwords.source(sources), subwords.target(targets), targets)
        encoded, left_out = _of_length(encoded, split, config.max_tokens)
        encoded.save(folder / f"{split}.parquet")
        counts[split] = {"pairs": len(encoded), "target_tokens": sum(map(len, encoded.target)), "left_out": left_out}
    return counts


def _of_length(pairs: Parallel, split: str, limit: int) -> tuple[Parallel, int]:
    """The training pairs that fit, and how many do not; all pairs of other splits must."""
    fits = [len(s) < limit and 0 < len(t) < limit for s, t in zip(pairs.source, pairs.target)]  # <eos> is added
    if split != "train" and not all(fits):
        number = fits.index(False)
        raise UserError(
            f"Split '{split}', pair {number}: {len(pairs.source[number])} source and {len(pairs.target[number])} "
            f"target subwords; data.max_tokens={limit} allows {limit - 1}. Raise it, or shorten the pair."
        )
    kept = [number for number, good in enumerate(fits) if good]
    if not kept:
        raise UserError(f"Split '{split}': no pair is shorter than data.max_tokens={limit}.")
    columns = (pairs.source, pairs.target, pairs.reference)
    return Parallel(*([column[n] for n in kept] for column in columns)), len(pairs) - len(kept)  # type: ignore[arg-type]


# ── where pairs come from ───────────────────────────────────────────────────


def read_pairs(config: MtDataConfig) -> dict[Split, list[Pair]]:
    """The pairs of every split."""
    splits: dict[Split, list[Pair]]
    if config.corpus == "bible":
        splits = _bible(config)
    elif not config.files:
        raise UserError("data.files: names no file. Give data.files={train: [...], dev: [...], test: [...]}.")
    else:
        splits = {split: _read(split, [Path(name) for name in config.files[split]], config) for split in SPLITS}
    for split, pairs in splits.items():
        if not pairs:
            raise UserError(f"The split '{split}' has no pair (data.{config.corpus}).")
    return splits


def _bible(config: MtDataConfig) -> dict[Split, list[Pair]]:
    from pema_ray.tasks.bible import check_books, split_of, verses

    check_books((*config.dev_books, *config.test_books))
    splits: dict[Any, list[Pair]] = {split: [] for split in SPLITS}
    for _, book, source, target in verses():
        splits[split_of(book, config.dev_books, config.test_books)].append((source, target))
    return splits


def _read(split: str, paths: list[Path], config: MtDataConfig) -> list[Pair]:
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file (data.files, split '{split}').")
    try:
        if len(paths) == 1:
            return _read_jsonl(paths[0], config)
        source, target = (path.read_text(encoding="utf-8").split("\n") for path in paths)
    except UnicodeDecodeError as error:
        raise UserError(f"{paths[0].parent}: split '{split}' is not valid UTF-8 (near byte {error.start}).") from None
    source, target = (lines[:-1] if lines[-1] == "" else lines for lines in (source, target))
    if len(source) != len(target):
        raise UserError(f"{paths[0]} has {len(source):,} lines, {paths[1]} has {len(target):,}: they are no pairs.")
    pairs = [(s.strip(), t.strip()) for s, t in zip(source, target)]
    for number, pair in enumerate(pairs, start=1):
        if not all(pair):
            raise UserError(f"{paths[0] if not pair[0] else paths[1]}: line {number} is empty. Remove the pair.")
    return pairs


def _read_jsonl(path: Path, config: MtDataConfig) -> list[Pair]:
    pairs = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                pair = (row[config.source].strip(), row[config.target].strip())
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}: broken JSON: {error.msg}.") from None
            except (KeyError, TypeError, AttributeError):
                names = f"'{config.source}' and '{config.target}' (data.source, data.target)"
                raise UserError(f"{path}: line {number}: needs the texts {names}.") from None
            if not all(pair):
                raise UserError(f"{path}: line {number}: source or target is empty. Remove the pair.")
            pairs.append(pair)
    return pairs


def _limited(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """A random sample of at most `limit` pairs, in their order."""
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[number] for number in sorted(random.Random(seed).sample(range(len(pairs)), limit))]


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """`[B, T]` int64."""
    array_BT = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, ids in enumerate(rows):
        array_BT[row, : len(ids)] = ids
    return array_BT
