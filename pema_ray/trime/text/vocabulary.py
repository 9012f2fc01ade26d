"""Text to token ids and back: words, byte-level BPE, characters or bytes. Knows `tokenizers` and no model.

Ids run from the most frequent token down, as adaptive softmax wants them. `<eos>` ends a line and stands before the
first token of a corpus; `<unk>` stands for a token that the vocabulary lacks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.trime.config import PrepareConfig

EOS, UNKNOWN = "<eos>", "<unk>"
FILE = "vocabulary.json"
_PUNCTUATION = re.compile(r"<unk>|\w+(?:'\w+)*|[^\w\s]")
_DEFAULT_BPE = 8192


class Vocabulary:
    """Made by `from_counts` or `train_bpe`, kept as JSON.

    Args:
        config: what it was made with; splitting text depends on it.
        tokens: by id.
        bpe: of `bpe` and `tokenizer`: the `tokenizers` library's own JSON.
        eos: the token that ends a line.
    """

    def __init__(self, config: PrepareConfig, tokens: Sequence[str], bpe: str | None = None, eos: str = EOS) -> None:
        self.config, self.tokens, self.eos, self._bpe = config, list(tokens), eos, bpe
        self._ids = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        return self._ids[self.eos]

    @property
    def unknown_id(self) -> int | None:
        """None: every text can be encoded (`bpe`, `tokenizer`)."""
        return None if self._bpe else self._ids[UNKNOWN]

    def encode(self, text: str) -> np.ndarray:
        """Token ids `[T]` int32 of a text, with an `<eos>` at the end of every line (`tokenizer`: of the text)."""
        if self.config.vocabulary == "tokenizer":
            return np.array([*self._tokenizer.encode(text, add_special_tokens=False).ids, self.eos_id], np.int32)
        if self.config.vocabulary == "bpe":
            ids: list[int] = []
            for line in lines_of(text, self.config):
                ids += self._tokenizer.encode(line).ids
                ids += [self.eos_id] * self.config.line_ends
            return np.array(ids, np.int32)
        unknown = self._ids[UNKNOWN]
        return np.fromiter((self._ids.get(t, unknown) for t in split_text(text, self.config)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text; of `bpe`, `character` and `byte` the original."""
        match self.config.vocabulary:
            case "tokenizer":
                return self._tokenizer.decode([int(i) for i in ids])
            case "bpe":
                lines: list[list[int]] = [[]]
                for token in ids:
                    if token == self.eos_id:
                        lines.append([])
                    else:
                        lines[-1].append(int(token))
                return "\n".join(self._tokenizer.decode(line) for line in lines)
            case "byte":
                return b"".join(_byte(self.tokens[i]) for i in ids).decode("utf-8", errors="replace")
            case "character":
                return "".join(self.tokens[i] for i in ids)
        return " ".join(self.tokens[i] for i in ids).replace(f" {EOS}", "\n").replace(EOS, "")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as text of its own."""
        if self._bpe:
            return [self.eos if i == self.eos_id else self._tokenizer.decode([int(i)]) for i in ids]
        return [self.tokens[i] for i in ids]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        assert self._bpe is not None
        return Tokenizer.from_str(self._bpe)

    def save(self, folder: Path) -> None:
        data = {"config": self.config.model_dump(mode="json"), "tokens": self.tokens, "eos": self.eos, "bpe": self._bpe}
        with atomic_file(folder / FILE) as temporary:
            temporary.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Raises `UserError` if the folder holds none."""
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(PrepareConfig.model_validate(data["config"]), data["tokens"], data["bpe"], data["eos"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such vocabulary. Run: pema-ray trime prepare") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a readable vocabulary: {error}") from None


def lines_of(text: str, config: PrepareConfig) -> Iterator[str]:
    """The lines of a text without their ends; the last one's end begins no further line."""
    text = text.lower() if config.lowercase else text
    return iter(text.removesuffix("\n").split("\n"))


def split_text(text: str, config: PrepareConfig) -> Iterator[str]:
    """Tokens of a text, unknown ones included. Not of `bpe` and `tokenizer`."""
    text = text.lower() if config.lowercase else text
    if config.vocabulary == "character":
        yield from text
    elif config.vocabulary == "byte":
        yield from map(_BYTES.__getitem__, text.encode("utf-8"))
    else:
        cut: Callable[[str], list[str]] = str.split if config.words == "space" else _PUNCTUATION.findall
        for line in lines_of(text, config):
            yield from cut(line)
            if config.line_ends:
                yield EOS


def from_counts(config: PrepareConfig, counts: Counter[str]) -> Vocabulary:
    """The vocabulary of counted tokens, `<eos>` and `<unk>` always among them, the most frequent first."""
    rare = [token for token, count in counts.items() if count < config.min_count and token != EOS]
    kept = Counter(counts)
    for token in rare:
        del kept[token]
    kept[EOS] += 0
    kept[UNKNOWN] += sum(counts[token] for token in rare)
    tokens = sorted(kept, key=lambda token: (-kept[token], token))
    if config.max_words is not None and len(tokens) > config.max_words:
        last = set(tokens[config.max_words :]) - {EOS, UNKNOWN}
        special = [token for token in (EOS, UNKNOWN) if token in tokens[config.max_words :]]
        tokens = [token for token in tokens[: config.max_words - len(special)] if token not in last] + special
    return Vocabulary(config, tokens)


def train_bpe(config: PrepareConfig, texts: Iterable[str]) -> Vocabulary:
    """A byte-level BPE of `max_words` tokens; ids keep the order in which merges were found."""
    lines = (line for text in texts for line in lines_of(text, config))
    raw = train_tokenizer(lines, config.max_words or _DEFAULT_BPE, [EOS], False, config.min_count)
    by_id = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    return Vocabulary(config, [token for token, _ in by_id], raw.to_str())


def train_tokenizer(texts: Iterable[str], size: int, special: list[str], prefix_space: bool, min_count: int = 0) -> Any:
    """A byte-level BPE of the `tokenizers` library.

    Args:
        special: its special tokens, with the first ids.
        prefix_space: whether a text is read with a space in front.
        min_count: how often a merged pair must occur.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return raw


def from_tokenizer(config: PrepareConfig) -> Vocabulary:
    """The vocabulary of a transformers tokenizer; its end-of-text token ends a document."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = config.tokenizer
    assert name is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"prepare.tokenizer={name}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token is None:
        raise UserError(f"prepare.tokenizer={name}: a fast tokenizer with an end-of-text token is needed.")
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    return Vocabulary(config, tokens, tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token))


# A byte as a token: printable ASCII as itself, the others by their number.
_BYTES = [chr(b) if 32 <= b < 127 else "\n" if b == 10 else f"<{b:02x}>" for b in range(256)]


def _byte(token: str) -> bytes:
    return bytes([_BYTES.index(token)]) if token in _BYTES else b"?"
