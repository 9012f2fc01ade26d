"""A prefix keeps its numbers in peft's layout, is named by its content, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from pema_ray.errors import UserError
from pema_ray.line.prefix import Prefix, PrefixShape

SHAPE = PrefixShape(layers=3, heads=2, head_size=4)


def prefix(n: int = 5, seed: int = 0) -> Prefix:
    return Prefix(torch.randn(n, SHAPE.width, generator=torch.Generator().manual_seed(seed)), SHAPE, frozen=2)


def test_layers_go_apart_and_together():
    one = prefix()
    layers = one.keys_and_values()
    assert [tuple(rows.shape) for pair in layers for rows in pair] == [(1, 2, 5, 4)] * 6
    again = Prefix.of(layers, frozen=2)
    assert torch.equal(again.embeddings, one.embeddings) and again.shape == SHAPE and again.handle == one.handle
    keys_of_layer_1, head_1, position_3 = layers[1][0], 1, 3
    start = (1 * 2 + 0) * 8 + head_1 * 4
    assert torch.equal(keys_of_layer_1[0, head_1, position_3], one.embeddings[position_3, start : start + 4])


def test_a_handle_names_content_and_number_format():
    one = prefix()
    others = (prefix(seed=1), prefix(4), one.replaced(one.embeddings.double()), one.replaced(-one.embeddings))
    added = (replace(one, text=(1, 2, 3, 4, 5)), replace(one, text=(1, 2, 3, 4, 6)))
    assert len({one.handle, *(other.handle for other in (*others, *added))}) == 7
    assert one.replaced(one.embeddings.clone()).handle == one.handle


def test_a_folder_gives_back_what_was_saved(tmp_path):
    one = prefix()
    one.save_pretrained(tmp_path / "prefix", "a model")
    again = Prefix.from_pretrained(tmp_path / "prefix")
    assert torch.equal(again.embeddings, one.embeddings) and (again.shape, again.frozen) == (SHAPE, 2)


def test_what_is_added_to_a_text_is_no_adapter_of_peft(tmp_path):
    added = replace(prefix(), text=(1, 2, 3, 4, 5))
    added.save_pretrained(tmp_path)
    assert Prefix.from_pretrained(tmp_path).text == added.text
    with pytest.raises((KeyError, ValueError), match="CARTRIDGE_ADDED_TO_TEXT"):
        pytest.importorskip("peft").PeftConfig.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="5 positions are added to a text of 2"):
        replace(added, text=(1, 2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "the prefix is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "the prefix is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "a LORA adapter"),
        (lambda folder: change(folder, num_layers=4), "rows of 64 numbers"),
        (lambda folder: change(folder, text=[1, 2, 3, 4, 5]), "a CARTRIDGE prefix with a text of 5 tokens"),
        (lambda folder: change(folder, num_frozen_tokens=6), "6 frozen positions of 5"),
        (lambda folder: save_file({"other": torch.zeros(1)}, folder / "adapter_model.safetensors"), "damaged"),
    ],
)
def test_damage_is_named(damage, said: str, tmp_path):
    prefix().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        Prefix.from_pretrained(tmp_path)


def change(folder, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_it_and_gives_the_same_logits(kind: str, tiny_plm, tmp_path):
    peft = pytest.importorskip("peft")
    plm = tiny_plm(kind)
    cache = DynamicCache(config=plm.model.config)
    with torch.no_grad():
        plm.model(torch.tensor([list(range(40, 50))]), past_key_values=cache)
        own = Prefix.of([(layer.keys, layer.values) for layer in cache.layers])
        own = own.replaced(own.embeddings + 0.1 * torch.randn(own.embeddings.shape))
        cache = DynamicCache(config=plm.model.config)
        for number, (keys, values) in enumerate(own.keys_and_values()):
            cache.update(keys, values, number)
        ids = torch.tensor([[5, 9, 60, 61]])
        expected = plm.model(ids, past_key_values=cache).logits
        own.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(plm.model, tmp_path)
        logits = loaded(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
