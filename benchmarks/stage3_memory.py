"""Peak memory of stage 3 against rows, rank, vocabulary and batch: the workers of `train_adapter`, in other sizes.

Rows do not count (a worker has them in memory or in the object store): the remaining memory should not grow with them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _harness import Aim, console, device_of, options, run_worker, show, write_results

NAME = "stage3_memory"
WORKER = Path(__file__).with_name("train_adapter.py")
BASE = {"rows": 40_960, "rank": 128, "vocabulary": 16_384, "batch": 4096}
AIMS = {
    "rows_doubled": Aim(1.05, at_most=True),
    "rank_doubled": Aim(1.25, at_most=True),
    "vocabulary_doubled": Aim(2.0, at_most=True),
    "batch_doubled": Aim(2.0, at_most=True),
}


def main() -> None:
    parser = options("Peak memory of stage 3 by size.")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--scratch", type=Path, default=None, help="where rows are written (default: temporary)")
    o = parser.parse_args()
    device_of(o)
    base = {"rows": 256, "rank": 4, "vocabulary": 256, "batch": 64} if o.smoke else BASE
    hidden = 16 if o.smoke else o.hidden
    sizes = {"base": base} | {f"{name}_doubled": {**base, name: 2 * value} for name, value in base.items()}
    peaks = {name: _peak(o, hidden, size) for name, size in sizes.items()}
    ratios = {name: peaks[name] / peaks["base"] for name in sizes if name != "base"}
    figures = {
        "peak_bytes": peaks,
        "sizes": sizes,
        "hidden": hidden,
        "threads": o.threads,
        "smoke": o.smoke,
        "notes": ["Head, adapter, optimiser and activations; the rows themselves are not counted."],
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Peak memory of stage 3, relative to the base", ratios, AIMS, figures["notes"])
    console.print("  ".join(f"{name} {peak / 2**20:,.0f} MiB" for name, peak in peaks.items()))
    console.print(f"written: {path}")


def _peak(o: argparse.Namespace, hidden: int, size: dict[str, int]) -> int:
    with tempfile.TemporaryDirectory(prefix="sm", dir=o.scratch) as data:
        arguments = [f"--{name}={value}" for name, value in {**size, "hidden": hidden, "threads": o.threads}.items()]
        common = [*arguments, f"--data={data}", *(["--gpu"] if o.gpu else [])]
        run_worker(str(WORKER), ["--worker=data", *common])
        result: dict[str, Any] = run_worker(str(WORKER), ["--worker=ours", *common])
    return result["peak_bytes"]


if __name__ == "__main__":
    main()
