"""kNN-LM over the external memory: what followed the nearest contexts (Khandelwal et al., ICLR 2020, eqs. 2 and 3).

It needs no training and works alone or mixed with an adapter, but every process that generates answers must hold the
memory. N query rows, M rows in memory, H hidden, K neighbours, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from pema_ray.data_owner.training.batch_samplers import CHUNK, Rows
from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.memory.search.nearest import require_faiss

_ROWS_PER_LIST = 64  # of an inverted file's training sample; faiss advises at least 39


class NearestNeighbours:
    """`P_kNN(y | f) ∝ Σ w_i exp(-‖x - x_i‖² / T)` over the K nearest rows i whose target is y.

    Distances are between what the PLM's final norm makes of the representations, `x = norm(f)`.

    Args:
        rows: the memory.
        head: the PLM's, for its norm.
        neighbours: K.
        temperature: T, in squared distance.
        index: `flat` compares with every row, `inverted` with the rows of the nearest lists alone.
        probes: lists that `inverted` searches.

    Raises:
        UserError: faiss is not installed, or the memory has fewer than K rows.
    """

    def __init__(
        self,
        rows: Rows,
        head: LMHead,
        neighbours: int = 16,
        temperature: float = 100.0,
        index: Literal["flat", "inverted"] = "flat",
        probes: int = 16,
    ) -> None:
        faiss = require_faiss()
        count = len(rows.target)
        if neighbours > count:
            raise UserError(f"kNN-LM: {neighbours} neighbours requested, but the memory has {count} rows.")
        self.neighbours, self.temperature = neighbours, temperature
        self._target = torch.from_numpy(rows.target.astype(np.int64))
        weight = np.ones(count, np.float32) if rows.weight is None else rows.weight.astype(np.float32)
        self._log_weight = torch.from_numpy(weight).log()
        hidden = rows.key[:1].shape[1]
        self._index: Any = faiss.IndexFlatL2(hidden)
        if index == "inverted":
            lists = max(1, min(int(4 * count**0.5), count // _ROWS_PER_LIST))
            self._index = faiss.IndexIVFFlat(self._index, hidden, lists)
            self._index.nprobe = min(probes, lists)
            sample = np.sort(np.random.default_rng(0).permutation(count)[: lists * _ROWS_PER_LIST])
            self._index.train(_normed(rows.key[sample], head))
        for start in range(0, count, CHUNK):
            self._index.add(_normed(rows.key[start : start + CHUNK], head))

    def __len__(self) -> int:
        return len(self._target)

    def search(self, state_NH: torch.Tensor, head: LMHead) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distances `[N, K]`, nearest first, and their rows `[N, K]` (-1 if the lists have fewer than K)."""
        distance, row = self._index.search(_normed(state_NH.float().cpu().numpy(), head), self.neighbours)
        return torch.from_numpy(distance), torch.from_numpy(row)

    def log_probs(self, state_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
        """float32 log P_kNN `[N, V]`; minus infinity for tokens that follow no neighbour."""
        distance, row = self.search(state_NH, head)
        score = self._log_weight[row] - distance / self.temperature
        score[row < 0] = -torch.inf
        share = score.softmax(-1)
        probability = torch.zeros(len(row), head.vocab_size).scatter_add_(1, self._target[row], share)
        return probability.log().to(head.weight.device)


@torch.no_grad()
def _normed(state_NH: np.ndarray, head: LMHead) -> np.ndarray:
    state = torch.from_numpy(np.require(state_NH, requirements=["C", "W"])).to(head.weight.device)
    return np.ascontiguousarray(head.norm(state).float().cpu().numpy())
