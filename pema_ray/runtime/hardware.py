"""Where tensors live and in which number format: the one place that decides device, dtype and threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from pema_ray.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device to compute on: `auto` takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"Unknown device '{name}': use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"Device '{name}' was requested, but no CUDA device is visible. Use device: auto or cpu.")
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32 on this device (Ampere GPUs; CPUs with AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `auto` is bfloat16 where it is fast, float16 on older GPUs, else float32."""
    if name == "auto":
        if bf16_is_fast(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UserError(f"Unknown dtype '{name}': use auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def set_threads(threads: int) -> None:
    """Limit torch's CPU threads. Two processes that both take every core slow each other down tenfold.

    Args:
        threads: of the calling thread, and of threads that use torch for the first time later; 0 changes nothing.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if threading.current_thread().name.startswith(_COMPUTE):
        torch.get_num_threads()  # the first call fixes this thread's number
        setter = threading.Thread(target=torch.set_num_threads, args=(1,))
        setter.start()
        setter.join()


_COMPUTE = "compute"


def compute_elsewhere() -> None:
    """Limit the calling thread to one CPU thread of torch; for threads that only prepare or fetch data."""
    torch.set_num_threads(1)


def compute_thread() -> ThreadPoolExecutor:
    """The thread of this process in which torch computes; others use one CPU thread each, the main thread its own.

    Each thread in which torch computes in parallel gets a pool of OpenMP threads. Once all pools together have more
    threads than the machine has cores, libgomp puts them to sleep between operations: passes then take twice as long.
    So the engine and the decoder share this thread; threads that only encode frames need no pool.
    """
    with _lock:
        return _compute_thread()


_lock = threading.Lock()


@cache
def _compute_thread() -> ThreadPoolExecutor:
    if threading.current_thread() is threading.main_thread():
        torch.get_num_threads()  # fixes the main thread's number before the next lines
    executor = ThreadPoolExecutor(1, _COMPUTE)
    executor.submit(set_threads, 0).result()
    return executor


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, bytes: of the GPU if `device` is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_machine() -> dict[str, object]:
    """The machine that a benchmark ran on."""
    import os
    import platform

    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "bf16_is_fast": bf16_is_fast(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
