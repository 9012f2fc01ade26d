"""The decoder of the paper's language models, in the shapes of fairseq's: pre-norm, ReLU, sinusoidal positions.

Shapes: B sequences, T positions, H hidden, A attention heads, N states, V words.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pema_ray.trime.config import DecoderShape
from pema_ray.trime.model.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, Bands, TiedSoftmax
from pema_ray.trime.model.memory_lm import LMStates, TrainableLM, VocabularyScore


class DecoderLM(TrainableLM):
    """A `MemoryLM`: g(c) is what goes into the last layer's feed-forward block, after its norm.

    Args:
        max_positions: longest sequence it is meant for; sinusoids need no table, so longer ones work.
    """

    def __init__(self, shape: DecoderShape, vocabulary_size: int, max_positions: int) -> None:
        super().__init__()
        self.shape, self.hidden_size = shape, shape.hidden_size
        self.vocabulary_size, self.max_positions = vocabulary_size, max_positions
        if shape.cutoffs is None:
            self.embedding: nn.Module = nn.Embedding(vocabulary_size, shape.hidden_size)
            nn.init.normal_(self.embedding.weight, std=shape.hidden_size**-0.5)  # type: ignore[arg-type]
            self.softmax: AdaptiveSoftmax | TiedSoftmax = TiedSoftmax(self.embedding)  # type: ignore[arg-type]
        else:
            bands = Bands.of(vocabulary_size, shape.cutoffs, shape.factor, shape.hidden_size)
            self.embedding = AdaptiveEmbedding(bands, shape.hidden_size)
            self.softmax = AdaptiveSoftmax(self.embedding, shape.tie_projections, shape.tail_dropout)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.hidden_size) if shape.final_norm else nn.Identity()

    def represent(self, token_BT: Tensor) -> LMStates:
        """States and keys; position t sees tokens 0 … t."""
        x_BTH = self.embedding(token_BT) * math.sqrt(self.hidden_size)
        x_BTH = x_BTH + sinusoids(token_BT.shape[1], self.hidden_size, token_BT.device).to(x_BTH.dtype)
        x_BTH = F.dropout(x_BTH, self.shape.dropout, self.training)
        key_BTH = x_BTH
        for layer in self.layers:
            x_BTH, key_BTH = layer(x_BTH)
        return LMStates(self.final_norm(x_BTH), key_BTH)

    def score(self, state_NH: Tensor, target_N: Tensor) -> VocabularyScore:
        return self.softmax.score(state_NH, target_N)

    def log_probs(self, state_NH: Tensor) -> tuple[Tensor, Tensor]:
        return self.softmax.log_probs(state_NH)


class Layer(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x); the second norm's output is the memory key."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape, H = shape, shape.hidden_size
        self.attention_norm, self.ffn_norm = nn.LayerNorm(H), nn.LayerNorm(H)
        self.qkv, self.out = _linear(H, 3 * H), _linear(H, H)
        self.up, self.down = _linear(H, shape.ffn_size), _linear(shape.ffn_size, H)
        for part in self.qkv.weight.data.split(H):  # each of the three as a map of its own, as fairseq draws them
            nn.init.xavier_uniform_(part, gain=1 / math.sqrt(2))

    def forward(self, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
        s = self.shape
        x_BTH = x_BTH + F.dropout(self._attend(self.attention_norm(x_BTH)), s.dropout, self.training)
        key_BTH = self.ffn_norm(x_BTH)
        inner = F.dropout(F.relu(self.up(key_BTH)), s.activation_dropout, self.training)
        return x_BTH + F.dropout(self.down(inner), s.dropout, self.training), key_BTH

    def _attend(self, x_BTH: Tensor) -> Tensor:
        B, T, H = x_BTH.shape
        q, k, v = (
            part.view(B, T, self.shape.heads, -1).transpose(1, 2) for part in self.qkv(x_BTH).split(H, dim=-1)
        )  # each [B, A, T, H / A]
        dropout = self.shape.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(B, T, H))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def sinusoids(length: int, hidden_size: int, device: torch.device) -> Tensor:
    """Position encodings `[T, H]`: sines, then cosines, of frequencies from 1 down to 1/10000."""
    half = hidden_size // 2
    rate = torch.exp(torch.arange(half, device=device) * -(math.log(10000) / max(1, half - 1)))
    angle = torch.arange(1, length + 1, device=device)[:, None] * rate
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, hidden_size % 2))
