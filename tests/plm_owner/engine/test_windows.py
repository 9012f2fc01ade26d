"""Models whose states depend on the longest sequence of a pass, beyond a window that no probe reaches."""

from __future__ import annotations

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, MptConfig, MptForCausalLM, Phi3Config, Phi3ForCausalLM

from pema_ray.plm_owner.engine.checks import plain_states, random_ids, same_states
from pema_ray.plm_owner.engine.slots import SlotCaches, SlotTokens, make_caches
from pema_ray.plm_owner.model.load import LoadedPLM


def test_a_short_session_beside_one_beyond_the_local_window_keeps_its_states():
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=64, max_position_embeddings=256,
    )  # fmt: skip
    plm = LoadedPLM("neo", GPTNeoForCausalLM(config).eval().requires_grad_(False), None)
    caches = make_caches(plm, 4, 256)
    assert not isinstance(caches, SlotCaches)
    long, short = random_ids(plm, 150, 0), random_ids(plm, 20, 1)
    caches.run([SlotTokens(0, 0, long[:-1]), SlotTokens(1, 0, short[:-1])])
    with torch.inference_mode():
        outputs = caches.run([SlotTokens(0, 149, long[-1:]), SlotTokens(1, 19, short[-1:])])
        for states, ids in zip(outputs, (long, short), strict=True):
            assert same_states(plm, states, plain_states(plm, ids)[-1:])


def test_the_longest_sequence_is_that_of_one_rotation_or_bias():
    mpt = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=128, vocab_size=99))
    assert LoadedPLM("mpt", mpt, None).max_positions == 128
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    phi = Phi3Config(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    assert LoadedPLM("phi", Phi3ForCausalLM(phi), None).max_positions == 64
