"""A local memory over the prompt and the text so far: what followed at similar positions. Knows torch alone.

TRIME's local memory (Zhong, Lei and Chen, EMNLP 2022, equation 2) on the data owner's side: trained maps make queries
and keys from received representations; values are the tokens that followed them. One softmax covers all entries and
the adapter's distribution:

    P(w) = a_0 P_PEMA(w) + Σ_{j<t, y_j=w} a_j,    a = softmax(s_0(x_t), q_t · k_1 / √D, …, q_t · k_{t-1} / √D)

B sequences, T positions, H hidden, D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_NEVER = -1e4  # a finite log 0, as minus infinity has no gradient
_AT_FIRST = 6.0  # s_0 before training: the memory has about 5 % of the mass at some dozens of positions


class LocalMemory(nn.Module):
    """Queries, keys and the adapter's own score.

    Args:
        width: D of queries and keys.
        dropout: on the input, while training.
    """

    def __init__(self, hidden_size: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.RMSNorm(hidden_size), nn.Dropout(dropout)
        self.query, self.key = (nn.Linear(hidden_size, width, bias=False) for _ in range(2))
        self.rest = nn.Linear(hidden_size, 1)  # s_0
        self.scale = 1 / math.sqrt(width)
        nn.init.zeros_(self.rest.weight)
        nn.init.constant_(self.rest.bias, _AT_FIRST)

    def forward(self, x_BTH: torch.Tensor, follows_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(log a_0, log Σ a_j over earlier positions followed by the same token)`, `[B, T]` each.

        Args:
            follows_BT: the token after each position. Sequences are padded on the right.
        """
        normed = self.drop(self.norm(x_BTH))
        past = torch.ones(x_BTH.shape[1], x_BTH.shape[1], dtype=torch.bool, device=x_BTH.device).tril(-1)
        log_a = self._log_shares(normed, self.key(normed), past)
        same_token = (follows_BT[:, :, None] == follows_BT[:, None, :]) & past
        return log_a[..., 0], log_a[..., 1:].masked_fill(~same_token, _NEVER).logsumexp(-1)

    def _log_shares(self, normed_BTH: torch.Tensor, key_BSD: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """`log a [B, T, 1 + S]` of the adapter and of S positions, masked by `visible`."""
        score = (self.query(normed_BTH) @ key_BSD.transpose(1, 2)) * self.scale
        score = score.masked_fill(~visible, _NEVER)
        return torch.cat([self.rest(normed_BTH), score], -1).log_softmax(-1)


class LocalMemoryCache:
    """Keys and values of one sequence while it is decoded; used as `LookBackCache`."""

    def __init__(self, memory: LocalMemory, x_TH: torch.Tensor, follows_T: torch.Tensor) -> None:
        self._memory = memory
        self._key_TD, self._value_T = memory.key(memory.norm(x_TH)), follows_T
        self._newest: torch.Tensor | None = None

    def step(self, x_1H: torch.Tensor) -> None:
        """Set the newest position."""
        self._newest = self._memory.norm(x_1H)

    def mix(self, log_pema_1V: torch.Tensor) -> torch.Tensor:
        """The mixture of the adapter's log-probabilities and the memory's at the newest position, `[1, V]`."""
        assert self._newest is not None, "step comes first"
        visible = torch.ones(1, len(self._key_TD), dtype=torch.bool, device=self._newest.device)
        log_a = self._memory._log_shares(self._newest[None], self._key_TD[None], visible)[0]
        probability = torch.zeros_like(log_pema_1V).scatter_add_(1, self._value_T[None], log_a[:, 1:].exp())
        return torch.logaddexp(log_pema_1V + log_a[:, :1], probability.log())

    def follow(self, token: int) -> None:
        """Name the token that followed the newest position."""
        if self._newest is None:
            return
        self._key_TD = torch.cat([self._key_TD, self._memory.key(self._newest)])
        self._value_T = torch.cat([self._value_T, torch.tensor([token], device=self._value_T.device)])
        self._newest = None


def log_mixture(
    x_NH: torch.Tensor,
    log_pema_NV: torch.Tensor,
    memory: LocalMemory,
    target_N: torch.Tensor,
    example_N: torch.Tensor,
    selected_N: torch.Tensor,
) -> torch.Tensor:
    """`LocalMemoryCache.mix` over whole sequences: log-probabilities `[n, V]` of the n selected rows.

    Args:
        log_pema_NV: of the selected rows alone, `[n, V]`.
        target_N: `[N]`, the token after each row; example_N: `[N]`, its sequence; rows are grouped by it, in order.
    """
    normed, probability, row = memory.norm(x_NH), torch.zeros_like(log_pema_NV), 0
    log_adapter = torch.empty(len(log_pema_NV), 1, device=log_pema_NV.device)
    for start, end in _borders(example_N):
        selected = selected_N[start:end]
        count = int(selected.sum())
        if not count:
            continue
        past = torch.ones(end - start, end - start, dtype=torch.bool, device=x_NH.device).tril(-1)
        log_a = memory._log_shares(normed[None, start:end], memory.key(normed[None, start:end]), past)[0][selected]
        log_adapter[row : row + count] = log_a[:, :1]
        values = target_N[start:end].expand(count, -1)
        probability[row : row + count].scatter_add_(1, values, log_a[:, 1:].exp() * past[selected])
        row += count
    return torch.logaddexp(log_pema_NV + log_adapter, probability.log())


def _borders(example_N: torch.Tensor) -> list[tuple[int, int]]:
    ends = torch.unique_consecutive(example_N, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
