"""Pooling and knowledge attention: equations, masks, independence of tokens."""

from __future__ import annotations

import pytest
import torch

from pema_ray.pluglm.model.attention import AttentivePooling, KnowledgeAttention, SentenceKnowledge, cosine

B, T, D, K, H = 2, 5, 12, 3, 4


class HeadsMergedWithoutTranspose(KnowledgeAttention):
    """The published code's fault."""

    def forward(self, state_BTD, cosine_BK, value_BKD):
        shape = state_BTD.shape
        query, key = self._split(self.query(state_BTD)), self._split(self.key(value_BKD))
        score = query @ key.transpose(-1, -2) / self.head_size**0.5
        score = score + self.beta[None, :, None, None] * cosine_BK[:, None, None, :]
        read = score.softmax(-1) @ self._split(self.value(value_BKD))
        return self.output(read.reshape(shape)), score.softmax(-1).mean(1)


def random_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, T, D), torch.rand(B, K), torch.randn(B, K, D)


def tokens_that_change(layer: KnowledgeAttention | SentenceKnowledge, token: int) -> list[int]:
    """The tokens of sequence 0 whose output changes with `token`; sequence 1 must not change."""
    state, cos, value = random_inputs()
    before, _ = layer(state, cos, value)
    changed = state.clone()
    changed[0, token] += torch.randn(D)
    after, _ = layer(changed, cos, value)
    assert torch.equal(before[1], after[1])
    return [t for t in range(T) if not torch.allclose(before[0, t], after[0, t], atol=1e-6)]


@pytest.mark.parametrize("token", range(T))
def test_what_a_token_reads_depends_on_that_token_alone(token: int) -> None:
    torch.manual_seed(0)
    assert tokens_that_change(KnowledgeAttention(D, H, 0.0), token) == [token]


def test_the_published_merge_of_heads_would_be_found() -> None:
    torch.manual_seed(0)
    assert tokens_that_change(HeadsMergedWithoutTranspose(D, H, 0.0), 0) != [0]


def test_knowledge_attention_is_the_equation_written_out() -> None:
    torch.manual_seed(0)
    layer = KnowledgeAttention(D, H, 0.0)
    torch.nn.init.normal_(layer.beta)
    state, cos, value = random_inputs()
    d = D // H
    expected = torch.empty(B, T, D)
    shares = torch.zeros(B, T, K)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                part = slice(h * d, (h + 1) * d)
                q, k, v = layer.query(state[b, t])[part], layer.key(value[b])[:, part], layer.value(value[b])[:, part]
                weight = (k @ q / d**0.5 + layer.beta[h] * cos[b]).softmax(0)
                expected[b, t, part] = weight @ v
                shares[b, t] += weight / H
    read, weight = layer(state, cos, value)
    assert torch.allclose(read, layer.output(expected), atol=1e-5)
    assert torch.allclose(weight, shares, atol=1e-6)


def test_the_bias_starts_at_one_for_every_head() -> None:
    assert KnowledgeAttention(D, H, 0.0).beta.tolist() == [1.0] * H


def test_sentence_level_gives_every_token_one_mixture_weighed_by_the_cosine() -> None:
    state, cos, value = random_inputs()
    read, weight = SentenceKnowledge()(state, cos, value)
    expected = torch.einsum("bk,bkd->bd", cos.softmax(-1), value)
    assert torch.allclose(read, expected[:, None].expand(B, T, D), atol=1e-6)
    assert torch.allclose(weight.sum(-1), torch.ones(B, T))


def test_pooling_weighs_by_exp_of_the_score_and_looks_at_no_padding() -> None:
    torch.manual_seed(0)
    pool, state = AttentivePooling(D), torch.randn(B, T, D)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    score = pool.score(torch.tanh(pool.hidden(state))).squeeze(-1).exp() * mask
    expected = (score / score.sum(1, keepdim=True)).unsqueeze(1) @ state
    assert torch.allclose(pool(state, mask), expected.squeeze(1), atol=1e-6)
    changed = state.clone()
    changed[0, 3:] = 1e6
    assert torch.equal(pool(state, mask), pool(changed, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_overflows_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool, layer = AttentivePooling(D).to(dtype), KnowledgeAttention(D, H, 0.0).to(dtype)
    state, value = (torch.randn(B, T, D) * 100).to(dtype), (torch.randn(B, K, D) * 100).to(dtype)
    pool.score.weight.data *= 1000  # exp of such a score is infinite in any 16 bits
    assert pool(state, torch.ones(B, T)).isfinite().all()
    query, key = torch.full((B, 64), 200.0, dtype=dtype), torch.full((B, K, 64), 200.0, dtype=dtype)
    cos = cosine(query, key)  # 64 · 200² is more than float16 holds
    assert torch.allclose(cos.float(), torch.ones(B, K), atol=1e-2)
    assert layer(state, cos, value)[0].isfinite().all()
