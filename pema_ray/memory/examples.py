"""The examples of a build: numbered, read and tokenised where they are needed.

`PreparedPairs` are rows of `prepare/<split>.parquet`, which tasks tokenise; `ListedExamples` are tokenised already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.tasks import EncodedPair, Pair, Prompter, Task
from pema_ray.tasks.shots import SimilarShots

_BATCH_ROWS = 2**16
_FEW = 1024  # pairs: tokenised within a second, sooner than Ray starts a worker
_prompters: dict[tuple[str, str], Prompter] = {}  # cache of this process: (fingerprint, digest of a wording) → prompter


class Examples(Protocol):
    """Numbered examples. Travels to tasks by pickle."""

    @property
    def at_hand(self) -> bool:
        """Whether `read` is too little work for tasks of its own."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of everything that determines `read`."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[EncodedPair]:
        """Examples number `start` to `stop`, `stop` excluded."""
        ...


@dataclass(frozen=True)
class ListedExamples:
    """Examples that were tokenised before."""

    examples: Sequence[EncodedPair]
    at_hand = True

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.example_id, list(example.prompt), list(example.target))).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, start: int, stop: int) -> list[EncodedPair]:
        return list(self.examples[start:stop])


@dataclass(frozen=True)
class Wording:
    """The specification of prompts, cheap to pickle: each process makes its `Prompter` once.

    Attributes:
        bundle: the LM-head bundle's folder, for its tokenizer.
        shown: pairs that every prompt shows.
        similar: the prepared pairs to choose from, if each prompt shows those most similar to its source. Every
            process that tokenises then holds all of them.
        shots: how many of those a prompt shows.
        chat_template_kwargs: arguments of a chat template beside the messages.
    """

    bundle: Path
    task: Task
    chat: bool = False
    shown: tuple[Pair, ...] = ()
    similar: Path | None = None
    shots: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 of a prompter's inputs; the PLM's fingerprint covers the tokenizer."""
        template = [self.task.template, self.task.chat_system, self.task.chat_user] if self.chat else self.task.template
        similar = [self.shots, content_digest(self.similar)] if self.similar else None
        described = [template, self.chat, [asdict(pair) for pair in self.shown], similar]
        described += [dict(self.chat_template_kwargs)] if self.chat_template_kwargs else []
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def prompter(self) -> Prompter:
        """The prompter of this process.

        Raises:
            UserError: the bundle or the pairs to choose from cannot be read.
        """
        bundle = LMHeadBundle.load(self.bundle)
        key = bundle.card.fingerprint, self.digest
        if key not in _prompters:
            shown = SimilarShots(list(read_pairs(self.similar)), self.shots) if self.similar else self.shown
            _prompters[key] = self._prompter(bundle.tokenizer(), shown)
        return _prompters[key]

    @cached_property
    def probe(self) -> list[list[int]]:
        """Token ids of a fixed prompt and target, without shots; they differ between ways of tokenising."""
        tokenizer = LMHeadBundle.load(self.bundle).tokenizer()
        example = self._prompter(tokenizer).encode_pair(Pair(0, "Thou art 1 äß.", "You are 1 äß."))
        return [example.prompt, example.target]

    def _prompter(self, tokenizer: PLMTokenizer, shown: Sequence[Pair] | SimilarShots = ()) -> Prompter:
        return Prompter(tokenizer, self.task, shown, self.chat, self.chat_template_kwargs)


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs of a prepared split, tokenised where they are read.

    Attributes:
        path: a Parquet file of `prepare`.
        wording: how a pair becomes a prompt.
    """

    path: Path
    wording: Wording

    @property
    def at_hand(self) -> bool:
        return len(self) <= _FEW and self.wording.similar is None

    @property
    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:  # reads the whole file
        parts = [content_digest(self.path), self.wording.digest, self.wording.probe]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def __len__(self) -> int:
        with _open(self.path) as file:
            return file.metadata.num_rows

    def read(self, start: int, stop: int) -> list[EncodedPair]:
        prompter = self.wording.prompter()
        return [prompter.encode_pair(pair) for pair in read_pairs(self.path, start, stop)]


def read_pairs(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Pair]:
    """Prepared pairs number `start` to `stop`; reads their row groups only, one after the other.

    Raises:
        UserError: the file does not exist, or `prepare` did not write it.
    """
    with _open(path) as file:
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            first, last = max(start, begin), end if stop is None else min(stop, end)
            if first < last:
                table = file.read_row_group(group).slice(first - begin, last - first)
                yield from (Pair(**row) for row in table.to_pylist())
            begin = end


def content_digest(path: Path) -> str:
    """sha256 of the pairs in a prepared file, whatever its row groups, encodings and metadata. Reads the whole file."""
    columns = ("example_id", "source", "target")
    contents, lengths = {name: hashlib.sha256() for name in columns}, hashlib.sha256()
    with _open(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
            contents["example_id"].update(batch.column("example_id").to_numpy().astype("<i8").tobytes())
            texts = [batch.column(name).cast(pa.binary()) for name in columns[1:]]
            for name, text in zip(columns[1:], texts, strict=True):
                contents[name].update(b"".join(text.to_pylist()))
            lengths.update(np.column_stack([_lengths(text) for text in texts]).tobytes())
    digests = [digest.hexdigest() for digest in (*contents.values(), lengths)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _lengths(text: pa.BinaryArray) -> np.ndarray:
    """Bytes of each text, int64."""
    return np.fromiter(map(len, text.to_pylist()), "<i8", len(text))


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such prepared split. Run: pema-ray prepare") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}. Run: pema-ray prepare"
        ) from None
