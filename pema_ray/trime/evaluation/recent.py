"""The long memory of evaluation: keys of the last positions scored, whatever window they were scored in.

Knows torch alone. A position enters once, when it is scored: a window's context is not stored again (the published code
does, which `evaluate.count_context_twice` repeats). Shapes: P positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RecentKeys:
    """Keys of the last `capacity` consecutive positions.

    The buffer is twice as long, so that a window copies its own keys and only now and then all of them.
    """

    def __init__(self, capacity: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        assert capacity > 0
        self.capacity = capacity
        self._buffer_PH = torch.zeros(2 * capacity, hidden_size, device=device)
        self._filled, self.end = 0, 0
        """`end`: the position after the newest."""

    @property
    def begin(self) -> int:
        """The oldest position kept."""
        return self.end - min(self._filled, self.capacity)

    def append(self, key_PH: Tensor) -> None:
        """Add the keys of the next positions."""
        kept_PH = key_PH[-self.capacity :]
        if self._filled + len(kept_PH) > len(self._buffer_PH):
            keep = self.capacity - len(kept_PH)
            self._buffer_PH[:keep] = self._buffer_PH[self._filled - keep : self._filled].clone()
            self._filled = keep
        self._buffer_PH[self._filled : self._filled + len(kept_PH)] = kept_PH
        self._filled += len(kept_PH)
        self.end += len(key_PH)

    def between(self, low: int, high: int) -> Tensor:
        """Keys of positions `low … high - 1`, all of which must be kept."""
        assert self.begin <= low <= high <= self.end
        base = self._filled - self.end
        return self._buffer_PH[low + base : high + base]
