"""The exported bundle has the model's own norm and head, proved against its logits, and a fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.engine.checks import plain_states
from pema_ray.plm_owner.model.export import export_lm_head

NORMS = {"opt": "layer_norm", "opt_without_final_norm": "identity", "gpt2": "layer_norm", "cohere": "layer_norm"}


@pytest.fixture(scope="module")
def bundle(tiny_plm) -> Callable[[str], LMHeadBundle]:
    """The bundle of a tiny model."""
    return cache(lambda architecture: export_lm_head(tiny_plm(architecture)))


def test_head_of_norm_of_state_equals_the_models_logits(architecture: str, tiny_plm, bundle):
    ids = torch.randint(3, 300, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    state, head = plain_states(tiny_plm(architecture), ids), bundle(architecture).head
    with torch.inference_mode():
        expected = tiny_plm(architecture).model(torch.tensor([ids])).logits[0].float()
    assert expected.std() > 0.05  # the weights are large enough to notice a wrong norm or scale
    torch.testing.assert_close(head.logits(head.norm(state)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.log_probs(head.norm(state)), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_the_norm_matters_to_the_logits(architecture: str, tiny_plm, bundle):
    head = bundle(architecture).head
    assert head.spec.norm == NORMS.get(architecture, "rms_norm")
    if head.spec.norm != "identity":
        state = plain_states(tiny_plm(architecture), [5, 6, 7, 8])
        assert (head.logits(state) - head.logits(head.norm(state))).abs().max() > 1e-2


def test_scales_and_caps_of_the_logits_are_exported(bundle):
    spec = {name: bundle(name).head.spec for name in ("llama", "gemma2", "cohere", "granite")}
    assert (spec["llama"].logit_scale, spec["llama"].logit_softcap) == (1.0, None)
    assert spec["gemma2"].logit_softcap == 5.0
    assert spec["cohere"].logit_scale == 0.25
    assert spec["granite"].logit_scale == 0.25  # 1 / logits_scaling


def test_tied_and_untied_heads_are_both_copied(tiny_plm, bundle):
    for architecture, tied in (("gpt2", True), ("qwen2", True), ("llama", False)):
        plm, head = tiny_plm(architecture), bundle(architecture).head
        embeddings = plm.model.get_input_embeddings().weight
        assert (plm.model.get_output_embeddings().weight is embeddings) is tied
        assert torch.equal(head.weight, embeddings) is tied
        assert head.weight.data_ptr() != plm.model.get_output_embeddings().weight.data_ptr()


def test_the_card_gives_sizes_and_no_weights(architecture: str, bundle, tokenizer):
    card = bundle(architecture).card
    hidden = 16 if architecture == "opt_without_final_norm" else 32
    assert (card.hidden_size, card.vocab_size, card.max_positions) == (hidden, len(tokenizer), 96)
    assert card.eos_token_ids == (1,)
    assert len(card.fingerprint) == 16 and card.fingerprint in card.label
    assert set(card.to_dict()) == {"name", "fingerprint", "hidden_size", "vocab_size", "max_positions", "eos_token_ids"}


def test_fingerprints_differ_between_all_architectures(bundle, architectures):
    assert len({bundle(name).card.fingerprint for name in architectures}) == len(architectures)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_the_same_checkpoint_has_one_fingerprint_in_float32_and_bfloat16(name: str, tiny_plm_folder, bundle):
    for dtype in ("float32", "bfloat16"):
        plm = _load(tiny_plm_folder(name), dtype)
        assert export_lm_head(plm).card.fingerprint == bundle(name).card.fingerprint


def test_another_folder_name_is_the_same_plm(tiny_plm_folder, bundle, tmp_path: Path):
    shutil.copytree(tiny_plm_folder("llama"), tmp_path / "renamed")
    card = export_lm_head(_load(tmp_path / "renamed")).card
    assert card.name == "renamed"
    assert card.fingerprint == bundle("llama").card.fingerprint


def _load(folder: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> LoadedPLM:
    return load_plm(PLMConfig(name=str(folder), dtype=dtype, device="cpu", threads=1))


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.norm.weight"])
def test_one_changed_weight_of_norm_or_head_is_another_plm(weight: str, tiny_plm_folder, bundle, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_plm_folder("llama"), tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensors[weight].view(-1)[17] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert export_lm_head(_load(tmp_path / "changed")).card.fingerprint != bundle("llama").card.fingerprint


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("config.json", "rms_norm_eps", 0.03),
        ("config.json", "hidden_act", "gelu"),
        ("config.json", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("generation_config.json", "eos_token_id", [0]),
    ],
)
def test_another_computation_over_the_same_weights_is_another_plm(
    file: str, setting: str, value: object, tiny_plm_folder, bundle, tmp_path: Path
):
    shutil.copytree(tiny_plm_folder("llama"), tmp_path / "changed")
    path = tmp_path / "changed" / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, setting: value}))
    assert export_lm_head(_load(tmp_path / "changed")).card.fingerprint != bundle("llama").card.fingerprint


def test_another_tokenizer_is_another_plm(tiny_plm_folder, bundle, tmp_path: Path):
    shutil.copytree(tiny_plm_folder("llama"), tmp_path / "swapped")
    path = tmp_path / "swapped" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    assert export_lm_head(_load(tmp_path / "swapped")).card.fingerprint != bundle("llama").card.fingerprint


def test_a_model_whose_logits_the_head_cannot_express_is_refused_by_name(tiny_plm, monkeypatch):
    plm = replace(tiny_plm("llama"))
    forward = plm.model.forward

    def twisted(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits + 0.1 * out.logits.flip(-1)
        return out

    monkeypatch.setattr(plm.model, "forward", twisted)
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits in a way") as caught:
        export_lm_head(plm)
    assert plm.name in str(caught.value)


@pytest.mark.parametrize("wrong", ["everywhere", "at one token"])
def test_a_model_in_bfloat16_is_proved_beyond_its_rounding(tiny_plm_folder, monkeypatch, wrong: str):
    """Large logits may be two of bfloat16's steps off; an error at a single token is found nevertheless."""
    plm = _load(tiny_plm_folder("llama"), "bfloat16")
    with torch.no_grad():
        plm.model.get_output_embeddings().weight.mul_(64)
    assert export_lm_head(plm).head.dtype == torch.bfloat16
    forward = plm.model.forward

    def twisted(*args, **kwargs):
        out = forward(*args, **kwargs)
        if wrong == "everywhere":
            out.logits = out.logits + 0.1 * out.logits.flip(-1)
        else:
            out.logits[..., 7] += out.logits.std()
        return out

    monkeypatch.setattr(plm.model, "forward", twisted)
    with pytest.raises(UserError, match="computes its logits in a way"):
        export_lm_head(plm)


def test_states_that_change_a_little_from_pass_to_pass_are_no_fault_of_the_head(tiny_plm_folder):
    """Logits are compared with the states of their own pass: kernels may round differently in the next."""
    plm = _load(tiny_plm_folder("llama"))
    noise = torch.Generator().manual_seed(0)
    plm.model.get_input_embeddings().register_forward_hook(
        lambda _module, _ids, out: out + 1e-4 * out.std() * torch.randn(out.shape, generator=noise)
    )
    assert not torch.equal(*(plm.model(input_ids=torch.arange(9)[None]).logits for _ in range(2)))
    export_lm_head(plm)


def test_an_unknown_norm_and_a_missing_head_are_refused_by_name(tiny_plm, monkeypatch):
    plm = replace(tiny_plm("qwen2"), model=deepcopy(tiny_plm("qwen2").model))
    with monkeypatch.context() as patch:
        patch.setattr(plm.model, "get_output_embeddings", lambda: None)
        with pytest.raises(UserError, match="Qwen2ForCausalLM has no LM head"):
            export_lm_head(plm)
    plm.decoder.norm = torch.nn.Tanh()
    with pytest.raises(UserError, match="final norm is a Tanh"):
        export_lm_head(plm)
    del plm.decoder.norm
    with pytest.raises(UserError, match="cannot find the final norm of Qwen2Model"):
        export_lm_head(plm)


def test_the_bundles_tokenizer_is_the_plms(bundle, tokenizer):
    rebuilt = bundle("llama").tokenizer().hf
    text = "He said unto them: große Häuser!"
    assert rebuilt(text).input_ids == tokenizer(text).input_ids
    assert rebuilt.chat_template == tokenizer.chat_template


def test_a_reloaded_bundle_predicts_what_the_model_predicts(architecture: str, tiny_plm, bundle, tmp_path: Path):
    exported = bundle(architecture)
    loaded = LMHeadBundle.load(exported.save(tmp_path / "bundle"))
    state = plain_states(tiny_plm(architecture), [4, 9, 33, 2, 17])
    assert loaded.card == exported.card
    assert loaded.head.spec == exported.head.spec
    assert loaded.tokenizer_files == exported.tokenizer_files
    assert torch.equal(*(head.log_probs(head.norm(state)) for head in (loaded.head, exported.head)))
