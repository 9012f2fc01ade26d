"""One module decides device, number format and threads, and refuses what is not there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.runtime.hardware import describe_machine, dtype_name, pick_device, pick_dtype, set_threads

CPU = torch.device("cpu")


def test_auto_takes_a_gpu_only_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


def test_auto_dtype_is_bfloat16_exactly_where_it_is_fast(monkeypatch):
    monkeypatch.setattr("pema_ray.runtime.hardware.bf16_is_fast", lambda device: True)
    assert pick_dtype("auto", CPU) is torch.bfloat16
    monkeypatch.setattr("pema_ray.runtime.hardware.bf16_is_fast", lambda device: False)
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


def test_only_the_compute_thread_and_the_main_thread_have_pools_of_cpu_threads():
    """In a process of its own: a thread's first use of torch fixes its number for good."""
    program = """
import torch
from concurrent.futures import ThreadPoolExecutor
from pema_ray.runtime.hardware import compute_elsewhere, compute_thread, set_threads
torch.set_num_threads(3)
number = lambda thread: thread.submit(lambda: (torch.ones(10**6) + 1, torch.get_num_threads())[1]).result()
default = number(compute_thread())
compute_thread().submit(set_threads, 2).result()
print(default, number(compute_thread()), number(ThreadPoolExecutor(1)), torch.get_num_threads())
compute_elsewhere()
print(number(compute_thread()), torch.get_num_threads())
compute_thread().submit(set_threads, 3).result()
print(number(compute_thread()), number(ThreadPoolExecutor(1)), torch.get_num_threads())
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.split("\n") == ["3 2 1 3", "2 1", "3 1 1", ""]
