"""A checkpoint that does not fill the whole model is refused, naming its tensors; no weight stays random."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.model.gguf import converted

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def changed(tiny_plm_folder, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model's folder with other tensors, or other settings in its config.json."""

    def make(architecture: str, change: Callable[[Tensors], Tensors], **settings) -> Path:
        folder = tmp_path / architecture
        shutil.copytree(tiny_plm_folder(architecture), folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    return make


def load(folder: Path) -> LoadedPLM:
    return load_plm(PLMConfig(name=str(folder), dtype="float32", device="cpu", threads=1))


def refusal(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The reason of a refusal, in at most two lines, with nothing else on the terminal."""
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        load(folder)
    terminal = capfd.readouterr()
    assert (terminal.out, terminal.err) == ("", "")
    assert str(caught.value).startswith(f"plm.name={folder}: ")
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def test_missing_norms_are_refused_by_name(changed, capfd):
    folder = changed("llama", lambda tensors: {name: t for name, t in tensors.items() if "norm" not in name})
    reason = refusal(folder, capfd)
    assert "the checkpoint lacks 5 tensors (model.layers.0.input_layernorm.weight, " in reason
    assert "Download or save it again" in reason


def test_one_missing_tensor_of_each_kind_is_found(architecture: str, changed, capfd, tiny_plm_folder):
    names = load_file(Path(tiny_plm_folder(architecture)) / "model.safetensors")
    last = [name for name in names if re.search(r"\.1\.", name)][-1]
    folder = changed(architecture, lambda tensors: {name: t for name, t in tensors.items() if name != last})
    assert f"lacks 1 tensor ({last.removeprefix('transformer.')}" in refusal(folder, capfd).replace("transformer.", "")


def test_a_wrong_prefix_is_refused_with_both_sides_named(changed, capfd):
    folder = changed("llama", lambda tensors: {f"base_model.model.{name}": t for name, t in tensors.items()})
    reason = refusal(folder, capfd)
    assert "lacks 21 tensors (lm_head.weight, model.embed_tokens.weight, " in reason
    assert "holds 21 tensors (base_model.model.lm_head.weight, " in reason
    assert "Rename the tensors" in reason


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(changed, capfd, tokenizer):
    folder = changed("llama", lambda tensors: tensors, intermediate_size=48)
    reason = refusal(folder, capfd)
    assert "holds 6 tensors (model.layers.0.mlp.down_proj.weight, " in reason
    assert "model.layers.0.mlp.down_proj.weight is (32, 64), expected (32, 48)" in reason


def test_layers_that_the_config_leaves_out_are_refused(changed, capfd):
    folder = changed("llama", lambda tensors: tensors, num_hidden_layers=1)
    assert "leaves out 9 tensors (model.layers.1.input_layernorm.weight, " in refusal(folder, capfd)


def test_biases_that_the_config_leaves_out_are_refused(changed, capfd):
    bias = "model.layers.0.self_attn.q_proj.bias"
    folder = changed("llama", lambda tensors: {**tensors, bias: torch.ones(32)})
    assert f"leaves out 1 tensor ({bias}) of the checkpoint" in refusal(folder, capfd)


def test_a_head_for_another_purpose_is_ignored_and_logged(changed, caplog):
    folder = changed("llama", lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})
    with caplog.at_level(logging.WARNING, "pema_ray"):
        load(folder)
    assert "ignored 1 tensor (v_head.summary.weight) of the checkpoint" in caplog.text


def test_buffers_of_older_versions_are_ignored(changed, caplog):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    with caplog.at_level(logging.WARNING, "pema_ray"):
        load(changed("llama", lambda tensors: {**tensors, **old}))
    assert not caplog.text


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_tied_head_is_not_missing(name: str, tiny_plm_folder):
    folder = Path(tiny_plm_folder(name))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tied_embeddings_that_are_missing_are_refused(changed, capfd):
    folder = changed("qwen2", lambda tensors: {name: t for name, t in tensors.items() if "embed" not in name})
    assert "model.embed_tokens.weight" in refusal(folder, capfd)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("missing", ["model.norm.weight", "lora_A", None])
def test_a_lora_adapter_and_the_model_under_it_must_be_complete(
    missing, verbosity, changed, capfd, tmp_path: Path, tokenizer, caplog
):
    peft = pytest.importorskip("peft")
    caplog.set_level(verbosity, "transformers")
    base = changed("llama", lambda tensors: {name: t for name, t in tensors.items() if name != missing})
    folder = tmp_path / "adapter"
    tokenizer.save_pretrained(folder)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], base_model_name_or_path=str(base))
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if not missing or missing not in name}, weights)
    if missing:
        assert missing in refusal(folder, capfd)
    else:
        assert load(folder).model.config.num_hidden_layers == 2


def test_an_incomplete_gguf_file_is_refused_and_no_conversion_kept(tmp_path: Path, monkeypatch, tokenizer):
    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    monkeypatch.setattr("pema_ray.plm_owner.model.gguf.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    for missing in ("blk.0.attn_norm.weight", None):
        file = tmp_path / f"{missing}.gguf"
        write_gguf(gguf, file, len(tokenizer), missing)
        if missing:
            with pytest.raises(UserError, match=r"lacks 1 tensor \(model.layers.0.input_layernorm.weight\)"):
                load(file)
            assert not any((tmp_path / "cache" / "gguf").iterdir())
        else:
            assert load(file).model.config.num_hidden_layers == 1
            assert converted(file).is_dir()


def write_gguf(gguf, file: Path, vocabulary: int, missing: str | None) -> None:
    """A LLaMA of one layer, without the tensor `missing`."""
    shapes = {"token_embd": (vocabulary, 32), "output": (vocabulary, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    for name, shape in shapes.items():
        if f"{name}.weight" != missing:
            writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
