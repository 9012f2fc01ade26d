"""Look-back: causal attention over all received representations of a sequence, the prompt's included.

It runs on the data owner's side, which has received every representation and knows every token. Published PEMA uses
one representation at a time. B sequences, T positions, H hidden, D width.

The input at position t is `x_t`, which says what the PLM expects next, and the last token. A position attends to
earlier ones and, for each, to the token that followed, which may have to be copied or paraphrased.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

_HEADS = 4


class LookBack(nn.Module):
    """`x + Σ blocks`, the identity before training.

    Args:
        layers: number of blocks.
        width: D of the attention, divisible by 4; the feed-forward layers are four times as wide.
        dropout: while training, on a block's inputs and on the inputs of its two output layers.
    """

    def __init__(self, hidden_size: int, layers: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, width
        self.token_norm, self.drop = nn.RMSNorm(hidden_size), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden_size, width, dropout) for _ in range(layers))

    def forward(self, x_BTH: torch.Tensor, follows_BT: torch.Tensor, embedding_VH: torch.Tensor) -> torch.Tensor:
        """The adapter's input, `[B, T, H]`. Sequences are padded on the right.

        Args:
            follows_BT: the token after each position.
            embedding_VH: the LM head's weight, which embeds tokens in the same space.
        """
        return self._pass(x_BTH, follows_BT, embedding_VH)[0]

    def _pass(
        self, x_BTH: torch.Tensor, follows_BT: torch.Tensor, embedding_VH: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """The output `[B, T, H]`, each block's keys and values, and the embedded last token `[B, 1, H]`."""
        follows_BTH = self._embed(follows_BT, embedding_VH)
        read_BTH = F.pad(follows_BTH, (0, 0, 1, 0))  # the first position's last token is unknown
        last_B1H, read_BTH = read_BTH[:, -1:], read_BTH[:, :-1]
        past_TT = torch.ones(x_BTH.shape[1], x_BTH.shape[1], dtype=torch.bool, device=x_BTH.device).tril(-1)
        keys_values = []
        for block in self._blocks():
            normed = block.drop(block.norm(x_BTH))
            key, value = block.remember(normed, read_BTH, follows_BTH)
            keys_values.append((key, value))
            x_BTH = block.finish(x_BTH, block.attend(normed, read_BTH, key, value, past_TT))
        return x_BTH, keys_values, last_B1H

    def _blocks(self) -> list[_Block]:
        return [cast(_Block, block) for block in self.blocks]

    def _embed(self, token: torch.Tensor, embedding_VH: torch.Tensor) -> torch.Tensor:
        return self.drop(self.token_norm(F.embedding(token, embedding_VH).float()))


class _Block(nn.Module):
    """Attention with a trained null key, then a feed-forward layer, each added to its input.

    Initially a query is `x_t` and a key the token that followed: their product is large where the PLM would predict
    that token again. Output layers start at zero.
    """

    def __init__(self, hidden_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner_norm, self.drop = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size), nn.Dropout(dropout)
        self.query = nn.Linear(2 * hidden_size, width, bias=False)
        self.key = nn.Linear(3 * hidden_size, width, bias=False)
        self.value = nn.Linear(2 * hidden_size, width, bias=False)
        self.nothing = nn.Parameter(torch.zeros(2, width))  # its key and value
        self.out = nn.Linear(width, hidden_size, bias=False)
        self.up, self.down = nn.Linear(hidden_size, 4 * width), nn.Linear(4 * width, hidden_size)
        for output in (self.out.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(output)
        shared = nn.init.orthogonal_(torch.empty(width, hidden_size))
        with torch.no_grad():
            for linear, part in ((self.query, slice(0, hidden_size)), (self.key, slice(-hidden_size, None))):
                linear.weight.zero_()[:, part] = shared
            self.value.weight.zero_()[:, hidden_size:] = shared

    def remember(
        self, normed_BTH: torch.Tensor, read_BTH: torch.Tensor, follows_BTH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions whose next token is known, `[B, heads, T, D / heads]` each."""
        key = self.key(torch.cat([normed_BTH, read_BTH, follows_BTH], -1))
        return _by_head(key), _by_head(self.value(torch.cat([normed_BTH, follows_BTH], -1)))

    def attend(
        self,
        normed_BTH: torch.Tensor,
        read_BTH: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """The attention's result, `[B, T, D]`.

        Args:
            visible: the keys that a position attends to, broadcast to `[B, heads, T, keys]`, besides the null key.
        """
        query = _by_head(self.query(torch.cat([normed_BTH, read_BTH], -1)))
        none_key, none_value = (_by_head(row[None, None].expand(len(query), 1, -1)) for row in self.nothing)
        attended = F.scaled_dot_product_attention(
            query, torch.cat([none_key, key], 2), torch.cat([none_value, value], 2), F.pad(visible, (1, 0), value=True)
        )
        return attended.transpose(1, 2).flatten(2)

    def finish(self, x_BTH: torch.Tensor, attended_BTD: torch.Tensor) -> torch.Tensor:
        x_BTH = x_BTH + self.out(self.drop(attended_BTD))
        return x_BTH + self.down(self.drop(F.gelu(self.up(self.inner_norm(x_BTH)))))


def _by_head(rows_BTD: torch.Tensor) -> torch.Tensor:
    return rows_BTD.unflatten(-1, (_HEADS, -1)).transpose(1, 2)


class LookBackCache:
    """Keys and values of one sequence while it is decoded, so that a step costs one position.

    `step` returns the adapter's input at the newest position; `follow` then names the token that followed. It begins
    with the first T ≥ 0 positions, each followed by a token.
    """

    def __init__(
        self, look_back: LookBack, x_TH: torch.Tensor, follows_T: torch.Tensor, embedding_VH: torch.Tensor
    ) -> None:
        self._look_back = look_back
        self._newest: list[torch.Tensor] = []
        _, self._keys_values, self._read = look_back._pass(x_TH[None], follows_T[None], embedding_VH)

    def step(self, x_1H: torch.Tensor) -> torch.Tensor:
        """The newest position, `[1, H]` in and out."""
        x = x_1H[:, None]
        self._newest = []
        visible = torch.ones(1, self._keys_values[0][0].shape[2], dtype=torch.bool, device=x.device)
        for block, (key, value) in zip(self._look_back._blocks(), self._keys_values, strict=True):
            normed = block.norm(x)
            self._newest.append(normed)
            x = block.finish(x, block.attend(normed, self._read, key, value, visible))
        return x[:, 0]

    def follow(self, token: int, embedding_VH: torch.Tensor) -> None:
        """Name the token that followed the newest position; ignored if `step` was not called for it (λ is 0)."""
        if not self._newest:
            return
        follows = self._look_back._embed(torch.tensor([[token]], device=embedding_VH.device), embedding_VH)
        keys_values = []
        for block, normed, (key, value) in zip(self._look_back._blocks(), self._newest, self._keys_values, strict=True):
            new_key, new_value = block.remember(normed, self._read, follows)
            keys_values.append((torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)))
        self._keys_values, self._read, self._newest = keys_values, follows, []
