"""Random models of two layers, one for each kind of architecture."""

from __future__ import annotations

import torch

ARCHITECTURES = (
    "opt",
    "opt_without_final_norm",
    "gpt2",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "cohere",
    "granite",
    "mamba",
    "jamba",
    "granite_hybrid",
    "qwen3_next",
)
MAX_POSITIONS = 96


def random_model(architecture: str, vocab_size: int, seed: int = 0):
    """Two layers of random weights, large enough that norms, scales and positions all matter; exact in bfloat16."""
    import transformers as t

    common = {
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    opt = {
        **common,
        "init_std": 0.2,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "dropout": 0.0,
    }
    modern = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_POSITIONS,
    }
    without_head_size = {name: value for name, value in modern.items() if name != "head_dim"}
    mamba2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    delta_rule = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    configs = {
        "opt": lambda: t.OPTConfig(**opt, word_embed_proj_dim=32),
        "opt_without_final_norm": lambda: t.OPTConfig(**opt, word_embed_proj_dim=16, do_layer_norm_before=False),
        "gpt2": lambda: t.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_POSITIONS),
        "llama": lambda: t.LlamaConfig(**modern, tie_word_embeddings=False),
        "qwen2": lambda: t.Qwen2Config(**modern, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**modern),
        "gemma": lambda: t.GemmaConfig(**modern),
        "gemma2": lambda: t.Gemma2Config(**modern, final_logit_softcapping=5.0, sliding_window=12),
        "cohere": lambda: t.CohereConfig(**without_head_size, logit_scale=0.25),
        "granite": lambda: t.GraniteConfig(**without_head_size, logits_scaling=4.0),
        "mamba": lambda: t.MambaConfig(
            **common,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            time_step_rank=4,
            max_position_embeddings=MAX_POSITIONS,
        ),
        "jamba": lambda: t.JambaConfig(
            **without_head_size,
            **experts,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
        "granite_hybrid": lambda: t.GraniteMoeHybridConfig(
            **without_head_size,
            **mamba2,
            layer_types=["mamba", "attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=32,
        ),
        "qwen3_next": lambda: t.Qwen3NextConfig(
            **modern, **delta_rule, **experts, moe_intermediate_size=16, shared_expert_intermediate_size=16
        ),
        "qwen3_5": lambda: t.Qwen3_5TextConfig(**modern, **delta_rule),
        "falcon_h1": lambda: t.FalconH1Config(**without_head_size, **mamba2, mamba_d_ssm=64),
        "lfm2": lambda: t.Lfm2Config(**without_head_size, layer_types=["conv", "full_attention"]),
        "bamba": lambda: t.BambaConfig(**without_head_size, **mamba2, attn_layer_indices=[1]),
    }
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(configs[architecture]())
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters(recurse=False):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model
