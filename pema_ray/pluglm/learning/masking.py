"""Masking of tokens, and batches of masked sequences. Mathematics: numpy and torch.

Masks are drawn by (seed, epoch, sequence), so they do not depend on the number of processes; static masking draws them
once, by (seed, sequence).

Shapes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pema_ray.errors import UserError

IGNORED = -100
"""The label of a token that is not predicted."""


@dataclass(frozen=True)
class Masker:
    """BERT's recipe: of the selected tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Attributes:
        special: ids that are never selected.
        dynamic: draw new masks in every epoch.
    """

    mask_id: int
    vocabulary: int
    special: frozenset[int]
    share: float
    seed: int
    dynamic: bool

    @classmethod
    def of(cls, tokenizer: Any, share: float, seed: int, dynamic: bool) -> Masker:
        """Raises `UserError` for a tokenizer without a mask token."""
        if tokenizer.mask_token_id is None:
            raise UserError(f"{tokenizer.name_or_path or 'The tokenizer'}: has no mask token, which PlugLM needs.")
        special = frozenset(tokenizer.all_special_ids)
        return cls(tokenizer.mask_token_id, len(tokenizer), special, share, seed, dynamic)

    def mask(self, token_ids: np.ndarray, sequence: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, labels) int64 of one sequence; at least one token is selected, unless all are special."""
        random = np.random.default_rng([self.seed, epoch if self.dynamic else 0, sequence])
        inputs, labels = token_ids.astype(np.int64), np.full(len(token_ids), IGNORED, np.int64)
        candidates = np.flatnonzero(~np.isin(inputs, list(self.special)))
        if not len(candidates):
            return inputs, labels
        selected = random.choice(candidates, max(1, round(self.share * len(candidates))), replace=False)
        labels[selected] = inputs[selected]
        draw = random.random(len(selected))
        random_tokens = random.integers(0, self.vocabulary, len(selected))
        inputs[selected] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, random_tokens, inputs[selected]))
        return inputs, labels


def mean_entropy(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens, in float32; zero without any."""
    label_X = label_BT.flatten().to(logits_BTV.device)
    entropy = F.cross_entropy(logits_BTV.flatten(0, 1).float(), label_X, ignore_index=IGNORED, reduction="sum")
    return entropy / (label_X != IGNORED).sum().clamp_min(1)


class MaskedBatch(NamedTuple):
    """int64; padded on the right."""

    input_BT: Tensor
    mask_BT: Tensor
    label_BT: Tensor
    document_B: Tensor
    """Codes of the sequences' documents."""

    @property
    def predicted(self) -> int:
        """Tokens with a label."""
        return int((self.label_BT != IGNORED).sum())


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]], documents: Sequence[int], pad_id: int) -> MaskedBatch:
    """A batch of sequences (input ids, labels)."""
    B, T = len(rows), max(len(inputs) for inputs, _ in rows)
    input_BT, label_BT = np.full((B, T), pad_id, np.int64), np.full((B, T), IGNORED, np.int64)
    mask_BT = np.zeros((B, T), np.int64)
    for b, (inputs, labels) in enumerate(rows):
        input_BT[b, : len(inputs)], label_BT[b, : len(labels)], mask_BT[b, : len(inputs)] = inputs, labels, 1
    tensors = (torch.from_numpy(array) for array in (input_BT, mask_BT, label_BT, np.array(documents, np.int64)))
    return MaskedBatch(*tensors)
