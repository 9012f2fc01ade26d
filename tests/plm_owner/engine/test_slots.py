"""The engine uses caches only if a start-up check shows the states of plain forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batcher_kit import CLOSE
from tiny_models import random_model

from pema_ray.errors import UserError
from pema_ray.plm_owner import LoadedPLM
from pema_ray.plm_owner.engine.checks import plain_states
from pema_ray.plm_owner.engine.extraction import Extraction
from pema_ray.plm_owner.engine.slots import SeparateCaches, SlotCaches, SlotTokens, _Pass, _SlotLayer, make_caches

BATCHED = {"opt", "opt_without_final_norm", "gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "cohere", "granite"}
OTHERS = ("qwen3_5", "falcon_h1", "lfm2")  # not in `architecture`


@pytest.fixture
def random_plm():
    def make(architecture: str) -> LoadedPLM:
        return LoadedPLM(architecture, random_model(architecture, 380).eval().requires_grad_(False), None)

    return make


def test_sequences_are_batched_where_the_types_of_the_layers_allow_it(architecture: str, tiny_plm):
    caches = make_caches(tiny_plm(architecture), 2, 40)
    assert isinstance(caches, SlotCaches if architecture in BATCHED else SeparateCaches)
    assert Extraction(tiny_plm(architecture), 64).reuses_prefixes == (architecture in BATCHED)


@pytest.mark.parametrize(("kernel", "kind"), [("eager", SlotCaches), ("flex_attention", SeparateCaches)])
def test_sequences_are_batched_by_kernels_that_take_a_mask_for_each(kernel: str, kind: type, random_plm):
    plm = random_plm("llama")
    plm.model.set_attn_implementation(kernel)
    caches, ids = make_caches(plm, 2, 90), list(range(10, 40))
    assert isinstance(caches, kind)
    states = [caches.run([SlotTokens(1, 0, ids[:20])])[0], caches.run([SlotTokens(1, 20, ids[20:])])[0]]
    torch.testing.assert_close(torch.cat(states), plain_states(plm, ids), **CLOSE)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_with_linear_attention_run_singly(random_plm, name):
    plm = random_plm(name)
    caches, ids = make_caches(plm, 3, 90), list(range(10, 70))
    assert isinstance(caches, SeparateCaches)
    expected = plain_states(plm, ids)
    first, short = caches.run([SlotTokens(0, 0, ids[:20]), SlotTokens(1, 0, ids[:3])])
    second = caches.run([SlotTokens(0, 20, ids[20:50])])[0]
    (rewound,) = caches.run([SlotTokens(0, 40, [*ids[40:50], *ids[50:]])])
    torch.testing.assert_close(torch.cat([first, second[:20], rewound]), expected, **CLOSE)
    torch.testing.assert_close(short, expected[:3], **CLOSE)
    caches.copy(0, 2, 30)
    torch.testing.assert_close(caches.run([SlotTokens(2, 30, ids[30:])])[0], expected[30:], **CLOSE)


def test_a_model_whose_cache_gives_other_states_is_refused_by_name(random_plm):
    """Bamba, in this version of transformers."""
    with pytest.raises(UserError, match=r"bamba: BambaForCausalLM gives other states with a cache than without"):
        make_caches(random_plm("bamba"), 2, 40)


def test_a_broken_batched_cache_is_found_and_sequences_run_singly(tiny_plm, monkeypatch):
    written = _SlotLayer._written

    def broken(self, cache_ShTD, new_BhnD, current):
        """Writes pieces that continue a sequence one position too far."""
        position = current.position_Bn + (current.position_Bn[:, :1] > 0)
        shifted = replace(current, position_Bn=position, capacity=current.capacity + 1)
        return written(self, cache_ShTD, new_BhnD, shifted)

    monkeypatch.setattr(_SlotLayer, "_written", broken)
    assert isinstance(make_caches(tiny_plm("llama"), 2, 90), SeparateCaches)


@pytest.mark.parametrize("fault", ["forgets", "raises"])
def test_a_model_with_no_cache_that_works_is_refused_by_name(tiny_plm, monkeypatch, fault):
    def run(self, feeds):
        if fault == "raises":
            raise NotImplementedError("no reordering of this cache")
        return [plain_states(self._plm, list(feed.tokens)) for feed in feeds]

    monkeypatch.setattr(SlotCaches, "run", run)
    monkeypatch.setattr(SeparateCaches, "run", run)
    gives_other = "tiny-llama0: LlamaForCausalLM gives other states with a cache than without"
    reason = {"raises": "no reordering of this cache", "forgets": "the states differ"}[fault]
    with pytest.raises(UserError, match=rf"{gives_other}, or none \({reason}\)"):
        make_caches(tiny_plm("llama"), 2, 90)


def test_tokens_that_follow_one_by_one_are_few(tiny_plm, monkeypatch):
    """Where a kernel continues with one token per pass, a long piece is recomputed with the tokens before it."""
    plm, lengths = tiny_plm("jamba"), []
    caches, ids = make_caches(plm, 2, 90), list(range(10, 90))
    assert isinstance(caches, SeparateCaches) and caches._one_token
    forward = SeparateCaches._forward
    monkeypatch.setattr(
        SeparateCaches, "_forward", lambda self, ids, cache: (lengths.append(len(ids)), forward(self, ids, cache))[1]
    )
    pieces = [ids[:30], ids[30:60], ids[60:63]]
    states = [caches.run([SlotTokens(0, start, piece)])[0] for start, piece in zip((0, 30, 60), pieces, strict=True)]
    assert lengths == [30, 60, 1, 1, 1]
    torch.testing.assert_close(torch.cat(states), plain_states(plm, ids[:63]), **CLOSE)


def test_every_layer_indexes_its_cache_on_its_own_device(monkeypatch):
    """Layers of one model may lie on several devices; `meta` stands for the second one."""
    written, indexed = _SlotLayer._written, []

    def noted(self, cache_ShTD, new_BhnD, current):
        indexed.append({index.device.type for index in (current.rows, current.row_B1, current.position_Bn)})
        return written(self, cache_ShTD, new_BhnD, current)

    monkeypatch.setattr(_SlotLayer, "_written", noted)
    rows = torch.tensor([0, 2])
    shared = [_Pass(rows, rows[:, None], torch.arange(3).expand(2, 3), 3, 16)]
    for device in ("cpu", "meta", "meta"):
        layer, new = _SlotLayer(4, shared), torch.zeros(2, 2, 3, 8, device=device)
        keys, values = layer.update(new, new)
        assert keys.device.type == values.device.type == device
        assert keys.shape == values.shape == (2, 2, 3, 8)
        layer.copy(0, 1, 3)
    assert indexed == [{"cpu"}] * 2 + [{"meta"}] * 4
    assert len(shared[0]._copies) == 1  # one copy for all layers of a device


@pytest.mark.gpu
def test_a_model_over_several_devices_gives_the_states_of_one(tiny_plm_folder):
    """With one GPU: the first layer on it, the second on the CPU."""
    from transformers import AutoModelForCausalLM

    folder = tiny_plm_folder("llama")
    spread = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu",
        "model.norm": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    single = LoadedPLM("single", AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map=spread).eval()
    caches = make_caches(LoadedPLM("spread", model, None), 6, 90)
    assert isinstance(caches, SlotCaches)
    sequences = [list(range(10 + i, 40 + 3 * i)) for i in range(3)]
    # every second slot: rows are copied
    caches.run([SlotTokens(2 * i, 0, ids[:-4]) for i, ids in enumerate(sequences)])
    states = caches.run([SlotTokens(2 * i, len(ids) - 4, ids[-4:]) for i, ids in enumerate(sequences)])
    for ids, state in zip(sequences, states, strict=True):
        torch.testing.assert_close(state.cpu(), plain_states(single, ids)[-4:], **CLOSE)
