"""Messages across the line. Symbols: B sequences, N rows, H hidden size, V vocabulary."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A PLM owner's description of its model: enough to tokenise, store and train, without its weights."""

    name: str
    fingerprint: str
    """Hash of architecture, tokenizer, final norm and LM head: it names the PLM in every artefact."""
    hidden_size: int
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]

    @property
    def label(self) -> str:
        """Name and fingerprint, as error messages show them."""
        return f"{self.name} ({self.fingerprint})"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ModelCard:
        return cls(**{**data, "eos_token_ids": tuple(data["eos_token_ids"])})


@dataclass(frozen=True, slots=True)
class ExtractBatch:
    """Sequences to run once, teacher-forced, and the positions whose representations are requested.

    Attributes:
        token_ids: B sequences of token ids, of any lengths ≥ 1, without the prefix.
        first: for each sequence, the first position requested (counted without the prefix); all later ones are too.
        prefix: tokens before every sequence, which the PLM owner computes once for all of them.
        handle: of the key-value prefix before all tokens; empty: none.
        for_gradient: a gradient of these representations follows, so that the PLM owner may keep their graph.

    Raises:
        ValueError: an empty batch or sequence, or a position outside its sequence.
    """

    token_ids: list[list[int]]
    first: list[int]
    prefix: tuple[int, ...] = ()
    handle: str = ""
    for_gradient: bool = False

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("a batch needs at least one sequence")
        if len(self.token_ids) != len(self.first):
            raise ValueError(f"{len(self.token_ids)} sequences, but {len(self.first)} first positions")
        for ids, first in zip(self.token_ids, self.first, strict=True):
            if not 0 <= first < len(ids):
                raise ValueError(f"first position {first} lies outside a sequence of {len(ids)} tokens")

    @property
    def rows(self) -> int:
        """N, the number of representations in the answer."""
        return sum(len(ids) - first for ids, first in zip(self.token_ids, self.first, strict=True))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prefix included."""
        return len(self.prefix) + max(map(len, self.token_ids))

    @property
    def tokens(self) -> int:
        """Tokens sent: the prefix once, and every sequence."""
        return len(self.prefix) + sum(map(len, self.token_ids))

    @property
    def key(self) -> str:
        """A hash of what requests for the same representations have in common."""
        described = json.dumps([self.handle, self.prefix, self.token_ids, self.first])
        return hashlib.sha256(described.encode()).hexdigest()

    def split(self, parts: int) -> list[ExtractBatch]:
        """The sequences in order, in at most so many batches of similar numbers of sequences."""
        bounds = [len(self.first) * n // parts for n in range(parts + 1)]
        spans = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]
        return [replace(self, token_ids=self.token_ids[span], first=self.first[span]) for span in spans]
