"""Parallel text: where pairs come from, their subwords, and the ids kept as Parquet. Knows `tokenizers` and no model.

Of subwords made here, id 0 ends a sentence (`<eos>`) and id 1 pads, and begins, one (`<pad>`), on both sides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import Split
from pema_ray.trime.text.corpus import SPLITS
from pema_ray.trime.translation.config import MtDataConfig
from pema_ray.trime.translation.model import TRANSFORMERS

EOS, PAD = "<eos>", "<pad>"
Pair = tuple[str, str]
"""(source, target)."""


class Subwords(Protocol):
    """Text to ids and back, of both sides; the end of a sentence is not among the ids."""

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
        return cls(*(_train((pair[side] for pair in pairs), sizes[side]) for side in (0, 1)))

    @classmethod
    def load(cls, folder: Path) -> BytePairs:
        from tokenizers import Tokenizer

        return cls(*(Tokenizer.from_file(str(folder / f"{side}.json")) for side in ("source", "target")))

    def save(self, folder: Path) -> None:
        for side, raw in (("source", self._source), ("target", self._target)):
            with atomic_file(folder / f"{side}.json") as temporary:
                temporary.write_text(raw.to_str(), encoding="utf-8")

    def source(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._source.encode_batch(list(texts))]

    def target(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._target.encode_batch(list(texts))]

    def text(self, ids: Sequence[int]) -> str:
        return self._target.decode(list(ids)).strip()


class PretrainedSubwords:
    """The tokenizer of a checkpoint, which ends sources with a token that they keep."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name.removeprefix(TRANSFORMERS))
        except (OSError, ValueError, ImportError) as error:
            said = str(error).strip().splitlines()[0]
            raise UserError(f"model.name={name}: its tokenizer cannot be loaded: {said}") from None
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


def _train(texts: Iterable[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return raw


def load_subwords(folder: Path, model_name: str) -> Subwords:
    """What a run's text was encoded with."""
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
        """Mean target length; BM25 batching asks for it to speak of."""
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
            said = str(error).splitlines()[0]
            raise UserError(f"{path}: cannot be read: {said} Run: pema-ray trime mt-train") from None
        return cls(*(table.column(name).to_pylist() for name in ("source", "target", "reference")))

    def first(self, count: int) -> Parallel:
        return Parallel(self.source[:count], self.target[:count], self.reference[:count])


def prepare(config: MtDataConfig, model_name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Read the pairs, make the subwords, and write `<split>.parquet`; returns what there is.

    Raises:
        UserError: a file is missing or broken, sides do not match, a split is empty, or a held-out pair is too long.
    """
    pairs = {split: _limited(found, config.limits.get(split), seed) for split, found in read_pairs(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    if model_name.startswith(TRANSFORMERS):
        subwords: Subwords = PretrainedSubwords(model_name)
    else:
        subwords = BytePairs.train(pairs["train"], config)
        subwords.save(folder)
    told: dict[str, Any] = {"source_words": subwords.source_words, "target_words": subwords.target_words}
    for split, found in pairs.items():
        encoded = Parallel(
            subwords.source([s for s, _ in found]), subwords.target([t for _, t in found]), [t for _, t in found]
        )
        encoded, left_out = _of_length(encoded, split, config.max_tokens)
        encoded.save(folder / f"{split}.parquet")
        told[split] = {"pairs": len(encoded), "target_tokens": sum(map(len, encoded.target)), "left_out": left_out}
    return told


def _of_length(found: Parallel, split: str, most: int) -> tuple[Parallel, int]:
    """Training pairs that fit; all the others must."""
    fits = [len(s) < most and 0 < len(t) < most for s, t in zip(found.source, found.target)]  # <eos> comes to it
    if split != "train" and not all(fits):
        number = fits.index(False)
        raise UserError(
            f"Split '{split}', pair {number}: {len(found.source[number])} source and {len(found.target[number])} "
            f"target subwords; data.max_tokens={most} allows {most - 1}. Raise it, or shorten the pair."
        )
    kept = [number for number, good in enumerate(fits) if good]
    if not kept:
        raise UserError(f"Split '{split}': no pair is shorter than data.max_tokens={most}.")
    parts = (found.source, found.target, found.reference)
    return Parallel(*([part[n] for n in kept] for part in parts)), len(found) - len(kept)  # type: ignore[arg-type]


# ── where pairs come from ───────────────────────────────────────────────────


def read_pairs(config: MtDataConfig) -> dict[Split, list[Pair]]:
    """The pairs of every split."""
    found: dict[Split, list[Pair]]
    if config.corpus == "bible":
        found = _bible(config)
    elif not config.files:
        raise UserError("data.files: names no file. Give data.files={train: [...], dev: [...], test: [...]}.")
    else:
        found = {split: _read(split, [Path(name) for name in config.files[split]], config) for split in SPLITS}
    for split, pairs in found.items():
        if not pairs:
            raise UserError(f"The split '{split}' has no pair (data.{config.corpus}).")
    return found


def _bible(config: MtDataConfig) -> dict[Split, list[Pair]]:
    from pema_ray.tasks.bible import check_books, split_of, verses

    check_books((*config.dev_books, *config.test_books))
    found: dict[Any, list[Pair]] = {split: [] for split in SPLITS}
    for _, book, source, target in verses():
        found[split_of(book, config.dev_books, config.test_books)].append((source, target))
    return found


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
                told = json.loads(line)
                pair = (told[config.source].strip(), told[config.target].strip())
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}: broken JSON: {error.msg}.") from None
            except (KeyError, TypeError, AttributeError):
                names = f"'{config.source}' and '{config.target}' (data.source, data.target)"
                raise UserError(f"{path}: line {number}: needs the texts {names}.") from None
            if not all(pair):
                raise UserError(f"{path}: line {number}: source or target is empty. Remove the pair.")
            pairs.append(pair)
    return pairs


def _limited(pairs: list[Pair], most: int | None, seed: int) -> list[Pair]:
    """So many of them, drawn, in their order."""
    if most is None or most >= len(pairs):
        return pairs
    return [pairs[number] for number in sorted(random.Random(seed).sample(range(len(pairs)), most))]


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """`[B, T]` int64."""
    found = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, ids in enumerate(rows):
        found[row, : len(ids)] = ids
    return found
