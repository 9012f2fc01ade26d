"""The decoding state of one sequence, for an adapter that looks back. T positions, H hidden, V vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from pema_ray.data_owner.adapter.local_memory import LocalMemoryCache
from pema_ray.data_owner.adapter.look_back import LookBackCache
from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.line import LMHead


class DecodingState:
    """The caches of one sequence: `step` takes the newest position, `follow` the token that came after it.

    Args:
        x_TH: the prompt's positions in the adapter's space, the newest last.
        tokens: their T tokens.
    """

    def __init__(self, adapter: PemaAdapter, head: LMHead, x_TH: torch.Tensor, tokens: Sequence[int]) -> None:
        self._head = head
        follows = torch.tensor(list(tokens[1:]), dtype=torch.long, device=x_TH.device)
        past = x_TH[:-1]  # `step` takes the newest position
        look_back, local_memory = adapter.look_back, adapter.local_memory
        self._look_back = LookBackCache(look_back, past, follows, head.weight) if look_back else None
        self._local_memory = LocalMemoryCache(local_memory, past, follows) if local_memory else None

    def step(self, x_1H: torch.Tensor) -> torch.Tensor:
        """The newest position after attention to those before it, `[1, H]`."""
        if self._local_memory is not None:
            self._local_memory.step(x_1H)
        return x_1H if self._look_back is None else self._look_back.step(x_1H)

    def mix(self, log_pema_1V: torch.Tensor) -> torch.Tensor:
        """The adapter's log-probabilities with the local memory's mixed in."""
        return log_pema_1V if self._local_memory is None else self._local_memory.mix(log_pema_1V)

    def follow(self, token: int) -> None:
        """Name the token that followed the newest position."""
        if self._look_back is not None:
            self._look_back.follow(token, self._head.weight)
        if self._local_memory is not None:
            self._local_memory.follow(token)

    def fork(self) -> DecodingState:
        """A copy for a second sequence; both share the tensors of the past, which are never modified."""
        fork = copy.copy(self)
        fork._look_back, fork._local_memory = copy.copy(self._look_back), copy.copy(self._local_memory)
        return fork
