"""A growing layer holds what transformers' dynamic layer holds, whatever is appended, cut or selected."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pema_ray.plm_owner.cache import GrowingLayer, attends_to_everything, growing_cache

OPERATION = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 9)),
    st.tuples(st.just("crop"), st.integers(1, 3)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=5)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
)


@given(operations=st.lists(OPERATION, max_size=12))
def test_it_holds_what_the_dynamic_layer_holds(operations):
    torch.manual_seed(0)
    ours, theirs, batch = GrowingLayer(), DynamicLayer(), 2
    for name, value in [("update", 3), *operations]:
        if name == "update":
            keys, values = torch.randn(2, batch, 4, value, 8)
            returned, expected = ours.update(keys, values), theirs.update(keys, values)
            assert all(torch.equal(a, b) for a, b in zip(returned, expected, strict=True))
        elif name == "crop" and theirs.get_seq_length() > value:
            ours.crop(-value), theirs.crop(-value)
        elif name == "select":
            rows = torch.tensor([n % batch for n in value])
            ours.batch_select_indices(rows), theirs.batch_select_indices(rows)
            batch = len(rows)
        elif name == "repeat" and batch < 20:
            ours.batch_repeat_interleave(value), theirs.batch_repeat_interleave(value)
            batch *= value
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_tokens_are_appended_without_copying_what_is_held():
    layer, moved = GrowingLayer(), 0
    layer.update(torch.zeros(2, 4, 100, 8), torch.zeros(2, 4, 100, 8))
    for _ in range(100):
        before = layer.keys.data_ptr()
        layer.update(torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8))
        moved += layer.keys.data_ptr() != before
    assert moved <= 4  # a quarter more room each time


def test_sliding_windows_stay_transformers_own(tiny_plm):
    llama, gemma = tiny_plm("llama").model.config, tiny_plm("gemma2").model.config
    assert all(type(layer) is GrowingLayer for layer in growing_cache(llama).layers)
    kinds = [type(layer) for layer in DynamicCache(config=gemma).layers]
    ours = [type(layer) for layer in growing_cache(gemma).layers]
    assert ours == [GrowingLayer if kind is DynamicLayer else kind for kind in kinds] and len(set(ours)) == 2
    assert attends_to_everything(growing_cache(llama)) and not attends_to_everything(growing_cache(gemma))
