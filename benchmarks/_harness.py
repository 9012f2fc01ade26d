"""What the benchmarks share: options, results files, tables of ratios, peak memory, workers. Knows no algorithm.

Figures differ between machines; only ratios are promised. Both sides of a ratio are measured in one run, in turns,
and their medians are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pema_ray.runtime.environment import quiet_libraries
from pema_ray.runtime.hardware import describe_machine, peak_memory, set_threads

quiet_libraries()  # here, because every benchmark imports this module before Ray and transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
console = Console(width=max(120, Console().width))  # names of ratios are long, and their verdicts matter


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every measured process")
    parser.add_argument("--gpu", action="store_true", help="measure on the first CUDA device")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run? The ratios mean nothing")
    parser.add_argument("--results-dir", type=Path, default=RESULTS, help="where <name>.json is written")
    return parser


def device_of(options: argparse.Namespace) -> torch.device:
    """The measured device; also bounds this process's threads."""
    set_threads(options.threads)
    return torch.device("cuda" if options.gpu else "cpu")


# ── results ─────────────────────────────────────────────────────────────────


def write_results(
    name: str,
    ratios: Mapping[str, float],
    aims: Mapping[str, Aim],
    figures: Mapping[str, Any],
    results_dir: Path = RESULTS,
) -> Path:
    """Write `<results_dir>/<name>.json`: ratios, the figures behind them with the aims, the machine and the commit."""
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / f"{name}.json"
    figures = {**figures, "aims": {ratio: str(aims.get(ratio, "")) for ratio in ratios}}
    content = {"ratios": dict(ratios), "figures": figures, "machine": describe_machine(), "commit": _commit()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _commit() -> str | None:
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


@dataclass(frozen=True, slots=True)
class Aim:
    """What a ratio should be: at least, or at most, a value."""

    value: float
    at_most: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.value if self.at_most else ratio >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.value:g}"


def show(title: str, ratios: Mapping[str, float], aims: Mapping[str, Aim], notes: Sequence[str] = ()) -> None:
    """Print the ratios as a table, each beside its aim."""
    table = Table(title=title)
    for column in ("ratio", "measured", "aim", ""):
        table.add_column(column, justify="left" if column == "ratio" else "right", no_wrap=True)
    for name, ratio in ratios.items():
        aim = aims.get(name)
        verdict = "" if aim is None else "[green]met[/]" if aim.met(ratio) else "[red]missed[/]"
        table.add_row(name, f"{ratio:.3g}", str(aim or ""), verdict)
    console.print(table)
    for note in notes:
        console.print(f"[dim]{note}[/]")


# ── time ────────────────────────────────────────────────────────────────────


def clock(device: torch.device) -> float:
    """Seconds, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ── memory ──────────────────────────────────────────────────────────────────


class PeakMemory:
    """Memory used from now on: a process's peak less its memory at the start, or torch's own count on a GPU.

    To be used in a process of its own. On Linux the kernel's high-water mark is set back first, since a child
    starts with its parent's; elsewhere `ru_maxrss` is taken as it is.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.baseline = torch.cuda.memory_allocated()
        else:
            _reset_high_water_mark()
            self.baseline = _status("VmRSS") or peak_memory(torch.device("cpu"))

    def taken(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.baseline
        return (_status("VmHWM") or peak_memory(torch.device("cpu"))) - self.baseline


def _reset_high_water_mark() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def memory_available(device: torch.device) -> int | None:
    """Bytes that a new process may still take; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# ── workers ─────────────────────────────────────────────────────────────────


class OutOfMemory(Exception):
    """A worker ran out of memory."""


def run_worker(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `script arguments --out FILE` as a process of its own and return the JSON it writes.

    Raises:
        OutOfMemory: it ran out of memory, or was killed for it.
        RuntimeError: it failed in another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        process = subprocess.run(
            [sys.executable, script, *arguments, "--out", str(out)], stderr=subprocess.PIPE, text=True
        )
        if out.exists():
            result = json.loads(out.read_text())
            if result.get("out_of_memory"):
                raise OutOfMemory(" ".join(arguments))
            return result
        if process.returncode in (-9, 137):
            raise OutOfMemory(" ".join(arguments))
        raise RuntimeError(f"{script} {' '.join(arguments)} ended with {process.returncode}:\n{process.stderr[-4000:]}")


@contextmanager
def reporting_to(out: Path) -> Iterator[dict[str, Any]]:
    """A worker's side of `run_worker`: the dictionary is returned to it, and running out of memory is reported."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if one must die, then the worker
    report: dict[str, Any] = {}
    try:
        yield report
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        report = {"out_of_memory": True}
    out.write_text(json.dumps(report))
