"""A world of synthetic facts, "entity relation value": its vocabulary, its sentences, and memories of them.

Shapes: F facts (entities × relations), B queries, T = 5 tokens of a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pema_ray.pluglm.memory.entries import NewEntry, tensors_hash
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.knowledge import LocalKnowledge, document_codes

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CLS, _SEP, _MASK = 2, 3, 4
VALUE_PLACE = 3
"""Position of the value in a sentence: [CLS] entity relation value [SEP]."""


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word, after BERT's special tokens."""
    raw: Any = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_special_tokens(raw)


def with_special_tokens(raw: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that puts BERT's special tokens, the first of its vocabulary, around texts and pairs of texts."""
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", _CLS), ("[SEP]", _SEP)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


@dataclass(frozen=True)
class World:
    """Fact f is about entity f // relations and relation f % relations; its value is a number below `values`."""

    entities: int = 50
    relations: int = 4
    values: int = 20

    @property
    def facts(self) -> int:
        return self.entities * self.relations

    @cached_property
    def words(self) -> list[str]:
        kinds = (("entity", self.entities), ("relation", self.relations), ("value", self.values))
        return [f"{kind}-{number}" for kind, count in kinds for number in range(count)]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return word_tokenizer(self.words)

    def draw(self, random: np.random.Generator, other_than: np.ndarray | None = None) -> np.ndarray:
        """Values of all facts; with `other_than`, each differs from the one there."""
        if other_than is None:
            return random.integers(0, self.values, self.facts)
        return (other_than + random.integers(1, self.values, self.facts)) % self.values

    def held_out(self, random: np.random.Generator, share: float) -> np.ndarray:
        """True at facts that are never asked about in training."""
        held_out_F = np.zeros(self.facts, bool)
        held_out_F[random.choice(self.facts, round(share * self.facts), replace=False)] = True
        return held_out_F

    def tokens(self, value_F: np.ndarray) -> Tensor:
        """The facts as sentences `[F, T]`, equal to the tokenizer's."""
        fact = np.arange(self.facts)
        rows = np.empty((self.facts, 5), np.int64)
        rows[:, 0], rows[:, 4] = _CLS, _SEP
        rows[:, 1] = len(SPECIAL) + fact // self.relations
        rows[:, 2] = len(SPECIAL) + self.entities + fact % self.relations
        rows[:, VALUE_PLACE] = self.first_value + value_F
        return torch.from_numpy(rows)

    def questions(self) -> Tensor:
        """Sentences `[F, T]` with their values masked."""
        rows = self.tokens(np.zeros(self.facts, np.int64))
        rows[:, VALUE_PLACE] = _MASK
        return rows

    @property
    def first_value(self) -> int:
        """Token id of value 0."""
        return len(SPECIAL) + self.entities + self.relations

    @cached_property
    def codes(self) -> np.ndarray:
        """Document codes `[F]`: a fact is a document."""
        return document_codes([self.document_id(fact) for fact in range(self.facts)])

    def document_id(self, fact: int) -> str:
        return f"fact-{fact}"

    def entry(self, fact: int, value: int, source: str = "world") -> NewEntry:
        """A fact as an entry of a memory."""
        text = f"entity-{fact // self.relations} relation-{fact % self.relations} value-{value}"
        return NewEntry(text, source, self.document_id(fact), ("fact",))

    def entries(self, value_F: np.ndarray, source: str = "world") -> list[NewEntry]:
        return [self.entry(fact, int(value), source) for fact, value in enumerate(value_F)]


@torch.no_grad()
def knowledge_of_facts(model: PlugLMForMaskedLM, world: World, value_F: np.ndarray) -> LocalKnowledge:
    """A memory of all facts in this process, with the model's current keys and values: entry f is fact f."""
    token_FT = world.tokens(value_F)
    key_FQ, value_FD = model.model.encode_documents(token_FT, torch.ones_like(token_FT))
    F, T = token_FT.shape
    return LocalKnowledge(
        "facts", 0, "", torch.arange(F), torch.from_numpy(world.codes), key_FQ, value_FD,
        token_FT.flatten().to(torch.int32), torch.arange(1, F + 1) * T,
    )  # fmt: skip


def weights_hash(model: Any) -> str:
    """SHA-256 of all of a model's tensors."""
    return tensors_hash(model.state_dict())
