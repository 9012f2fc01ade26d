"""A quantised PLM loads by transformers' own methods, keeps its LM head, and has a fingerprint of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.engine.slots import SlotCaches, make_caches
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.quantization import is_floating_point, stores_quantized

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"load_in_8bit": True}
MISSING = [name for name in ("bitsandbytes", "optimum", "torchao") if not importlib.util.find_spec(name)]


def load(name: str | Path, **options: Any) -> LoadedPLM:
    return load_plm(PLMConfig(name=str(name), **{"dtype": "float32", "device": "cpu", "threads": 1, **options}))


def refusal(name: str | Path, quantization: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load(name, quantization=quantization)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "complaint"),
    [
        ({"quant_method": "gptqq"}, "quant_method is 'gptqq', expected one of .* Did you mean 'gptq'?"),
        ({"bits": 4}, "quant_method is 'None', expected one of aqlm, .*awq, "),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes needs load_in_4bit: true or load_in_8bit: true"),
        ({"quant_method": "gptq", "load_in_4bit": True}, "gptq does not take load_in_4bit"),
        ({**FOUR_BITS, "load_in_8bit": True}, "bitsandbytes: .* only one can be used at the same time"),
        ({**FOUR_BITS, "bnb_4bit_quant": "fp4"}, "unknown key 'bnb_4bit_quant' of bitsandbytes. Did you mean 'bnb"),
        ({**FOUR_BITS, "bnb_4bit_compute_dtype": "bfloat61"}, "bitsandbytes: .*bfloat61"),
        ({"quant_method": "gptq"}, "gptq: .* missing 1 required positional argument: 'bits'"),
    ],
)
def test_unknown_methods_and_settings_are_refused_by_name(quantization, complaint: str, tiny_plm_folder):
    with pytest.raises(UserError, match=f"^plm.quantization: {complaint}"):
        load(tiny_plm_folder("llama"), quantization=quantization)


@pytest.mark.parametrize(
    ("package", "quantization"),
    [
        ("bitsandbytes", FOUR_BITS),
        ("bitsandbytes", EIGHT_BITS),
        ("optimum", {"quant_method": "gptq", "bits": 4}),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(package: str, quantization, tiny_plm_folder):
    if package not in MISSING:
        pytest.skip(f"{package} is installed")
    assert f"pip install {package}" in refusal(tiny_plm_folder("llama"), quantization).replace(" -U", "")


def test_a_checkpoint_that_is_quantised_is_recognised(tiny_plm_folder, tmp_path: Path):
    assert not stores_quantized(tiny_plm_folder("llama"))
    assert not stores_quantized(str(tmp_path))  # loading it says that there is no model
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_plm_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FOUR_BITS}))
    assert stores_quantized(str(folder))
    assert "is quantised already. Leave plm.quantization out." in refusal(folder, EIGHT_BITS)


def test_a_quantised_head_is_refused_by_name(tiny_plm):
    class Packed(nn.Module):
        """A layer that keeps two numbers of four bits in a byte."""

        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)

    plm = tiny_plm("llama")
    model = deepcopy(plm.model)
    model.lm_head = Packed(model.lm_head)
    with pytest.raises(UserError, match=r"its LM head is quantised \(Packed\), the data owner needs it in floating"):
        export_lm_head(LoadedPLM("packed", model, plm.tokenizer))


def test_only_plain_tensors_in_a_float_format_count_as_floating_point():
    class Packed(torch.Tensor):
        """Says that it holds float32."""

    weight = torch.zeros(2, 2)
    assert is_floating_point(weight) and is_floating_point(nn.Parameter(weight.bfloat16()))
    assert not is_floating_point(weight.as_subclass(Packed))
    assert not any(map(is_floating_point, (weight.to(torch.int8), weight.to(torch.float8_e4m3fn), None)))


def test_codes_in_buffers_tell_two_quantised_plms_apart(tiny_plm):
    """Some methods keep quantised weights in buffers, not in parameters."""
    plm, cards = tiny_plm("llama"), []
    for code in (1, 2):
        model = deepcopy(plm.model)
        model.is_quantized = True
        model.model.layers[0].register_buffer("codes", torch.full((64,), code, dtype=torch.uint8))
        cards.append(export_lm_head(LoadedPLM(plm.name, model, plm.tokenizer)).card)
    assert len({card.fingerprint for card in (*cards, export_lm_head(plm).card)}) == 3


# ── with bitsandbytes, which computes on CPUs too ───────────────────────────


@pytest.fixture(scope="module")
def wide_plm_folder(tokenizer, tmp_path_factory) -> str:
    """A model whose layers are wide enough for blocks of 64 weights."""
    import transformers as t

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = t.LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.1, max_position_embeddings=96,
        bos_token_id=0, eos_token_id=1, **sizes,
    )  # fmt: skip
    folder = str(tmp_path_factory.mktemp("wide"))
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("quantization", [FOUR_BITS, EIGHT_BITS], ids=["4 bits", "8 bits"])
def test_a_plm_quantised_by_bitsandbytes_is_proved_batched_and_saved(quantization, device, wide_plm_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    full = export_lm_head(load(wide_plm_folder, device=device))
    plm = load(wide_plm_folder, device=device, quantization=quantization)
    assert plm.is_quantized and plm.device.type == device
    plm.model.save_pretrained(tmp_path)
    plm.tokenizer.save_pretrained(tmp_path)
    bundle = export_lm_head(plm)
    assert bundle.card.fingerprint != full.card.fingerprint
    torch.testing.assert_close(bundle.head.weight, full.head.weight)
    assert isinstance(make_caches(plm, 4, 90), SlotCaches)
    again = load(tmp_path, device=device)
    assert again.is_quantized and again.device.type == device
    assert export_lm_head(again).card.fingerprint == bundle.card.fingerprint


def test_a_head_quantised_by_bitsandbytes_is_refused(wide_plm_folder):
    pytest.importorskip("bitsandbytes")
    plm = load(wide_plm_folder, quantization={**FOUR_BITS, "llm_int8_skip_modules": ["nothing"]})
    with pytest.raises(UserError, match="its LM head is quantised"):
        export_lm_head(plm)
