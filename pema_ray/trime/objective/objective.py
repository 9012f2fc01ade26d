"""Model, memory and loss as one module, so that any training strategy can wrap it. Knows torch alone.

Shapes: B segments of this process, L positions, N positions that are no padding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pema_ray.trime.model.memory_lm import TrainableLM
from pema_ray.trime.objective.loss import joint_log_prob
from pema_ray.trime.objective.memories import PADDING, Kind, Places, external_memory, local_memory, long_memory
from pema_ray.trime.objective.softmax import MemoryScore


class MemoryMode(NamedTuple):
    """Which memory a batch sees."""

    memory: Kind
    hide_local: bool = False
    """For `ext`: only other segments are seen."""
    across_documents: bool = False
    """For `long`: the memory reaches over the ends of documents."""
    gather: bool = False
    """The memory is that of all processes."""


class TrimeObjective(nn.Module):
    """Training loss of a batch; `forward` returns sums, so that parts of an update add up.

    Args:
        dtype: of states and keys in the two softmaxes' matrix products, and of the model's where it is not float32.
    """

    def __init__(self, model: TrainableLM, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(
        self,
        input_BL: Tensor,
        label_BL: Tensor,
        document_BL: Tensor,
        segment_BL: Tensor,
        mode: MemoryMode,
        divisor: float,
    ) -> tuple[Tensor, Tensor]:
        """(loss, sums): `loss` is the summed -log P over `divisor`; `sums` float64 `[2]` are -log P of equation 2 and
        that of the vocabulary alone, in nats.

        Args:
            divisor: tokens of the update / number of processes, since strategies average over processes.
        """
        with self._autocast(input_BL.device):
            state_BLH, key_BLH = self.model.represent(input_BL)
        counts_BL = label_BL != PADDING
        if self.dtype != torch.float32:
            state_BLH, key_BLH = state_BLH.to(self.dtype), key_BLH.to(self.dtype)
        vocabulary = self.model.score(state_BLH[counts_BL], label_BL[counts_BL])
        memory = self._memory(key_BLH, label_BL, Places(segment_BL, document_BL), mode)
        nll_N = -joint_log_prob(vocabulary, memory)
        sums = torch.stack([nll_N.detach().double().sum(), -vocabulary.log_prob_N.detach().double().sum()])
        return nll_N.sum() / divisor, sums

    def _memory(self, key_BLH: Tensor, label_BL: Tensor, places: Places, mode: MemoryMode) -> MemoryScore | None:
        counts_BL = label_BL != PADDING
        match mode.memory:
            case "none":
                return None
            case "local":
                score = local_memory(key_BLH, label_BL)
                return MemoryScore(score.log_positive[counts_BL], score.log_normaliser[counts_BL])
            case "long":
                return long_memory(key_BLH, label_BL, places, mode.across_documents, mode.gather)
            case "ext":
                return external_memory(key_BLH, label_BL, places, mode.hide_local, mode.gather)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(device.type, self.dtype)
