"""One module decides device, number format and threads, and refuses what is not there."""

from __future__ import annotations

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.hardware import describe_machine, dtype_name, pick_device, pick_dtype, set_threads

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_only_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


def test_auto_dtype_is_bfloat16_exactly_where_it_is_fast(monkeypatch):
    monkeypatch.setattr("pema_ray.hardware.bf16_is_fast", lambda device: True)
    assert pick_dtype("auto", CPU) is torch.bfloat16
    monkeypatch.setattr("pema_ray.hardware.bf16_is_fast", lambda device: False)
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is torch.float16


def test_a_named_dtype_is_taken_and_named_back():
    for name in ("float32", "bfloat16", "float16"):
        assert dtype_name(pick_dtype(name, CPU)) == name
    with pytest.raises(UserError, match="Unknown dtype 'int8': use auto, float32, bfloat16, float16"):
        pick_dtype("int8", CPU)


def test_zero_threads_leaves_torch_as_it_is():
    before = torch.get_num_threads()
    set_threads(0)
    assert torch.get_num_threads() == before


def test_the_machine_is_described_in_plain_values():
    import json

    described = json.loads(json.dumps(describe_machine()))
    assert described["cores"] >= 1 and described["torch"] == torch.__version__
