"""Lets an adapter look back: causal attention over all representations of a sequence, the prompt's among them.

The PLM owner has no part in it: the data owner has received every representation and knows every token. Published PEMA
sees one representation at a time. B sequences, T positions, H hidden, D width.

At position t the input is `x_t`, which says what the PLM expects next, and the token read last. A position looks at
those before it, and of each also sees the token that followed: what may have to be copied, or put into other words.
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
        layers: blocks, one after the other.
        width: D of the attention, divisible by 4; the feed-forward layers are four times as wide.
        dropout: while training, of what goes into a block and of what its two layers add.
    """

    def __init__(self, hidden_size: int, layers: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, width
        self.token_norm, self.drop = nn.RMSNorm(hidden_size), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden_size, width, dropout) for _ in range(layers))

    def forward(self, x_BTH: torch.Tensor, follows_BT: torch.Tensor, embedding_VH: torch.Tensor) -> torch.Tensor:
        """What the adapter goes on with, `[B, T, H]`. Sequences are padded on their right.

        Args:
            follows_BT: the token after each position.
            embedding_VH: the LM head's weight: it names tokens in the same space.
        """
        follows_BTH = self._embed(follows_BT, embedding_VH)
        read_BTH = F.pad(follows_BTH, (0, 0, 1, 0))[:, :-1]  # what the first position read is not known
        past = torch.ones(x_BTH.shape[1], x_BTH.shape[1], dtype=torch.bool, device=x_BTH.device).tril(-1)
        for block in self._blocks():
            x_BTH = block(x_BTH, read_BTH, follows_BTH, past)
        return x_BTH

    def _blocks(self) -> list[_Block]:
        return [cast(_Block, block) for block in self.blocks]

    def _embed(self, token: torch.Tensor, embedding_VH: torch.Tensor) -> torch.Tensor:
        return self.drop(self.token_norm(F.embedding(token, embedding_VH).float()))

    def begin(self, x_TH: torch.Tensor, follows_T: torch.Tensor, embedding_VH: torch.Tensor) -> LookBackCache:
        """The cache of one sequence after its first T ≥ 0 positions, each followed by a token."""
        return LookBackCache(self, x_TH, follows_T, embedding_VH)


class _Block(nn.Module):
    """Attention with a key of nothing, then a feed-forward layer, each added to its input.

    It begins by looking for tokens that the PLM expects next: a query is `x_t`, a key the token that followed, and
    their product is large where the PLM would say that token again. What is found is not used before training.
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
        for closing in (self.out.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(closing)
        shared = nn.init.orthogonal_(torch.empty(width, hidden_size))
        with torch.no_grad():
            for linear, part in ((self.query, slice(0, hidden_size)), (self.key, slice(-hidden_size, None))):
                linear.weight.zero_()[:, part] = shared
            self.value.weight.zero_()[:, hidden_size:] = shared

    def forward(
        self, x_BTH: torch.Tensor, read_BTH: torch.Tensor, follows_BTH: torch.Tensor, past_TT: torch.Tensor
    ) -> torch.Tensor:
        normed = self.drop(self.norm(x_BTH))
        key, value = self.remember(normed, read_BTH, follows_BTH)
        return self.finish(x_BTH, self.attend(normed, read_BTH, key, value, past_TT))

    def remember(
        self, normed_BTH: torch.Tensor, read_BTH: torch.Tensor, follows_BTH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions, `[B, heads, T, D / heads]` each, once it is known what followed them."""
        key = self.key(torch.cat([normed_BTH, read_BTH, follows_BTH], -1))
        return _by_head(key), _by_head(self.value(torch.cat([normed_BTH, follows_BTH], -1)))

    def attend(
        self,
        normed_BTH: torch.Tensor,
        read_BTH: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """What positions find among keys, `[B, T, D]`.

        Args:
            seen: which keys a position may look at, broadcast to `[B, heads, T, keys]`; nothing is always among them.
        """
        query = _by_head(self.query(torch.cat([normed_BTH, read_BTH], -1)))
        none_key, none_value = (_by_head(row[None, None].expand(len(query), 1, -1)) for row in self.nothing)
        found = F.scaled_dot_product_attention(
            query, torch.cat([none_key, key], 2), torch.cat([none_value, value], 2), F.pad(seen, (1, 0), value=True)
        )
        return found.transpose(1, 2).flatten(2)

    def finish(self, x_BTH: torch.Tensor, found_BTD: torch.Tensor) -> torch.Tensor:
        x_BTH = x_BTH + self.out(self.drop(found_BTD))
        return x_BTH + self.down(self.drop(F.gelu(self.up(self.inner_norm(x_BTH)))))


def _by_head(rows_BTD: torch.Tensor) -> torch.Tensor:
    return rows_BTD.unflatten(-1, (_HEADS, -1)).transpose(1, 2)


class LookBackCache:
    """Keys and values of one sequence while it is decoded, so that a step costs one position.

    `step` returns what the adapter continues with at the newest position; `follow` then names the token that came.
    """

    def __init__(
        self, look_back: LookBack, x_TH: torch.Tensor, follows_T: torch.Tensor, embedding_VH: torch.Tensor
    ) -> None:
        self._look_back = look_back
        self._newest: list[torch.Tensor] = []
        x = x_TH[None]
        follows = look_back._embed(follows_T[None], embedding_VH)
        read = F.pad(follows, (0, 0, 1, 0))
        self._read = read[:, -1:]
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(-1)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block in look_back._blocks():
            normed = block.norm(x)
            key, value = block.remember(normed, read[:, :-1], follows)
            self._held.append((key, value))
            x = block.finish(x, block.attend(normed, read[:, :-1], key, value, past))

    def step(self, x_1H: torch.Tensor) -> torch.Tensor:
        """The newest position, `[1, H]` in and out."""
        x = x_1H[:, None]
        self._newest = []
        seen = torch.ones(1, self._held[0][0].shape[2], dtype=torch.bool, device=x.device)
        for block, (key, value) in zip(self._look_back._blocks(), self._held, strict=True):
            normed = block.norm(x)
            self._newest.append(normed)
            x = block.finish(x, block.attend(normed, self._read, key, value, seen))
        return x[:, 0]

    def follow(self, token: int, embedding_VH: torch.Tensor) -> None:
        """The newest position was followed by this token; nothing happens where `step` was not asked (λ is 0)."""
        if not self._newest:
            return
        follows = self._look_back._embed(torch.tensor([[token]], device=embedding_VH.device), embedding_VH)
        held = []
        for block, normed, (key, value) in zip(self._look_back._blocks(), self._newest, self._held, strict=True):
            new_key, new_value = block.remember(normed, self._read, follows)
            held.append((torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)))
        self._held, self._read, self._newest = held, follows, []
