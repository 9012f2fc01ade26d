"""The memory's part of equation 2, Σ exp(sim / θ), for many memory sizes and temperatures at once.

`sim(g, g_j) = g · g_j` (or -‖g - g_j‖², kNN-LM's); θ divides it: `τ √H` in TRIME's own distribution, `interp_temp` in
the second one. Knows torch alone. Shapes: N queries, M memory entries, S sizes, G temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogSums:
    """The memory's sums for each target, as calibration needs them.

    Attributes:
        all_NSG: log Σ exp(sim / θ) over the first entries, as many as each size says; -inf of none.
        hit_NSG: the same over those entries whose token is the target.
    """

    all_NSG: Tensor
    hit_NSG: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[LogSums]) -> LogSums:
        return cls(torch.cat([part.all_NSG for part in parts]), torch.cat([part.hit_NSG for part in parts]))

    def __getitem__(self, rows: slice) -> LogSums:
        return LogSums(self.all_NSG[rows], self.hit_NSG[rows])

    def cpu(self) -> LogSums:
        return LogSums(self.all_NSG.cpu(), self.hit_NSG.cpu())

    def at(self, size: int, temperature: int) -> tuple[Tensor, Tensor]:
        """`(all [N], hit [N])` of the size and the temperature with these numbers."""
        return self.all_NSG[:, size, temperature], self.hit_NSG[:, size, temperature]


def log_sums(similarity_NM: Tensor, hit_NM: Tensor, ends: Sequence[int], temperatures: Sequence[float]) -> LogSums:
    """Sums over the first `ends[s]` columns, for every size s and temperature.

    Args:
        similarity_NM: raw; -inf where an entry is hidden from a query.
        hit_NM: bool, the entry's token is the query's target.
        ends: rising; columns that each size reaches to.
        temperatures: θ.
    """
    rows = len(similarity_NM)
    all_NSG = similarity_NM.new_full((rows, len(ends), len(temperatures)), -torch.inf)
    hit_NSG = all_NSG.clone()
    begin = 0
    for size, end in enumerate(ends):
        columns = _segment(similarity_NM[:, begin:end], hit_NM[:, begin:end], temperatures)
        for number, (all_N, hit_N) in enumerate(columns):
            smaller = size - 1
            all_NSG[:, size, number] = all_N if size == 0 else torch.logaddexp(all_NSG[:, smaller, number], all_N)
            hit_NSG[:, size, number] = hit_N if size == 0 else torch.logaddexp(hit_NSG[:, smaller, number], hit_N)
        begin = max(begin, end)
    return LogSums(all_NSG, hit_NSG)


def _segment(similarity_NM: Tensor, hit_NM: Tensor, temperatures: Sequence[float]):
    """For each temperature, `(log Σ, log Σ over hits)` of these columns."""
    if not similarity_NM.shape[1]:
        nothing = similarity_NM.new_full((len(similarity_NM),), -torch.inf)
        yield from ((nothing, nothing) for _ in temperatures)
        return
    highest_N = similarity_NM.amax(1)
    shift_N = torch.where(highest_N.isfinite(), highest_N, torch.zeros_like(highest_N))
    below_NM = similarity_NM - shift_N[:, None]
    hit = hit_NM.to(below_NM.dtype)
    for temperature in temperatures:
        mass_NM = (below_NM / temperature).exp_()
        level_N = shift_N / temperature
        yield mass_NM.sum(1).log() + level_N, torch.linalg.vecdot(mass_NM, hit).log() + level_N
