"""Which tokens are masked, and batches of masked sequences. Mathematics: numpy and torch.

Masks are drawn by (seed, epoch, sequence), so they are the same however sequences are shared among processes; static
masking draws them once, by (seed, sequence).

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
    """BERT's recipe: of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay.

    Attributes:
        special: ids that are never chosen.
        dynamic: draw anew in every epoch.
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
        """(input ids, labels) int64 of one sequence; at least one token is chosen if any may be."""
        random = np.random.default_rng([self.seed, epoch if self.dynamic else 0, sequence])
        inputs, labels = token_ids.astype(np.int64), np.full(len(token_ids), IGNORED, np.int64)
        may = np.flatnonzero(~np.isin(inputs, list(self.special)))
        if not len(may):
            return inputs, labels
        chosen = random.choice(may, max(1, round(self.share * len(may))), replace=False)
        labels[chosen] = inputs[chosen]
        fate = random.random(len(chosen))
        others = random.integers(0, self.vocabulary, len(chosen))
        inputs[chosen] = np.where(fate < 0.8, self.mask_id, np.where(fate < 0.9, others, inputs[chosen]))
        return inputs, labels


def mean_entropy(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """Mean cross entropy of the tokens that have a label, in float32; zero where none has."""
    label_X = label_BT.flatten().to(logits_BTV.device)
    entropy = F.cross_entropy(logits_BTV.flatten(0, 1).float(), label_X, ignore_index=IGNORED, reduction="sum")
    return entropy / (label_X != IGNORED).sum().clamp_min(1)


class MaskedBatch(NamedTuple):
    """int64; padded on the right."""

    input_BT: Tensor
    mask_BT: Tensor
    label_BT: Tensor
    document_B: Tensor
    """Codes of the documents that the sequences were cut from."""

    @property
    def predicted(self) -> int:
        """Tokens with a label."""
        return int((self.label_BT != IGNORED).sum())


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]], documents: Sequence[int], pad_id: int) -> MaskedBatch:
    """Put sequences (input ids, labels) together."""
    B, T = len(rows), max(len(inputs) for inputs, _ in rows)
    input_BT, label_BT = np.full((B, T), pad_id, np.int64), np.full((B, T), IGNORED, np.int64)
    mask_BT = np.zeros((B, T), np.int64)
    for b, (inputs, labels) in enumerate(rows):
        input_BT[b, : len(inputs)], label_BT[b, : len(labels)], mask_BT[b, : len(inputs)] = inputs, labels, 1
    tensors = (torch.from_numpy(array) for array in (input_BT, mask_BT, label_BT, np.array(documents, np.int64)))
    return MaskedBatch(*tensors)
