"""How fast, and in how much memory, an adapter is trained: against the published training loop, written afresh.

Stage 1: the closed form against Adam on the reconstruction loss, until Adam is as good or the time is up. Stage 3:
`AdapterTrainer` against a loop that holds the fp32 logits `[N, V]` whole. Rows are made up, with the power-law spectrum
that context representations have. Each side runs in a process of its own, in turns; ours is the whole
`AdapterTrainer.run`.
N rows, H hidden, V vocabulary, R rank.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _harness import (
    Aim,
    OutOfMemory,
    PeakMemory,
    clock,
    console,
    device_of,
    memory_available,
    options,
    reporting_to,
    run_worker,
    show,
    write_results,
)

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.trainer import AdapterTrainer
from pema_ray.line import LMHead
from pema_ray.line.lm_head import HeadSpec
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import Keys
from pema_ray.runtime.hardware import dtype_name, pick_dtype
from pema_ray.training.strategies import Place

NAME = "train_adapter"
LEARNING_RATE, KAPPA, EPSILON = 1e-3, 0.2, 1e-5
DEV_ROWS = 4096
MARGIN = 2**30  # bytes left to everything else when the batch is chosen
AIMS = {
    "stage1_speed": Aim(50),
    "stage3_rows_per_second": Aim(2),
    "stage3_peak_memory": Aim(1 / 3, at_most=True),
}


class Block:
    """Rows in memory: `key [N, H]` float32, `target [N]` int32."""

    def __init__(self, folder: Path, split: str) -> None:
        self.key: np.ndarray = np.load(folder / f"{split}_key.npy")
        self.target: np.ndarray = np.load(folder / f"{split}_target.npy")
        self.weight = None

    @property
    def rows(self) -> MemoryRows:
        """The same, as the Trainer reads them."""
        index = np.arange(len(self.target))
        return MemoryRows(Keys("float32", self.key), self.target, index, index.astype(np.int32))


def main() -> None:
    o = _options()
    if o.worker:
        with reporting_to(o.out) as report:
            report |= WORKERS[o.worker](o)
    else:
        with tempfile.TemporaryDirectory(prefix="ta", dir=o.scratch) as scratch:
            _measure(o, Path(scratch))


def _options() -> argparse.Namespace:
    parser = options("Speed and peak memory of adapter training.")
    parser.add_argument("--rows", type=int, default=81_920, help="training rows; stage 3 passes over them once")
    parser.add_argument("--batch", type=int, default=20_480, help="of stage 3")
    parser.add_argument("--stage1-batch", type=int, default=20_480, help="of the published stage 1")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--spectrum", type=float, default=1.1, help="variance of component i is i to the minus this")
    parser.add_argument("--dropout", type=float, default=0.2, help="of both sides, as published")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of our LM head")
    parser.add_argument("--repeats", type=int, default=2, help="turns that each side takes in stage 3")
    parser.add_argument("--stage1-seconds", type=float, default=300.0, help="cap on the published stage 1")
    parser.add_argument("--stage1-epochs", type=int, default=200, help="cap on the published stage 1")
    parser.add_argument("--scratch", type=Path, default=None, help="where rows are written (default: temporary)")
    for hidden_option in ("--worker", "--data", "--out", "--target-error"):
        kind = {"--worker": str, "--target-error": float}.get(hidden_option, Path)
        parser.add_argument(hidden_option, type=kind, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.smoke and not o.worker:
        o.rows, o.batch, o.hidden, o.vocabulary, o.rank = 512, 128, 32, 512, 16
        o.repeats, o.stage1_seconds, o.stage1_batch = 1, 2.0, 128
    o.batch, o.stage1_batch = min(o.batch, o.rows), min(o.stage1_batch, o.rows)
    return o


def _measure(o: argparse.Namespace, scratch: Path) -> None:
    device = device_of(o)
    _worker(o, "data", scratch)
    requested, o.batch = o.batch, _fitting(o, device)
    while True:
        try:
            ours, published, stage1 = _turns(o, scratch)
            break
        except OutOfMemory:
            if o.batch < 2:
                raise
            o.batch //= 2
            console.print(f"[yellow]out of memory; both sides go on with batches of {o.batch:,}[/]")

    closed_form = median(turn["reconstruction_seconds"] for turn in ours)
    rates = {
        "ours": median(turn["rows_per_second"] for turn in ours),
        "published": median(turn["rows_per_second"] for turn in published),
    }
    peaks = {
        "ours": median(turn["peak_bytes"] for turn in ours),
        "published": median(turn["peak_bytes"] for turn in published),
    }
    ratios = {
        "stage1_speed": stage1["seconds"] / closed_form,
        "stage3_rows_per_second": median(
            a["rows_per_second"] / b["rows_per_second"] for a, b in zip(ours, published, strict=True)
        ),
        "stage3_peak_memory": peaks["ours"] / peaks["published"],
    }
    notes = ["Peak memory counts head, adapter, optimiser and activations; not the rows, which both sides hold."]
    if not stage1["reached"]:
        notes.append(
            f"stage1_speed is a lower bound: after {stage1['seconds']:.0f} s and {stage1['epochs']} epochs the "
            f"published loop is at {stage1['error']:.4g}, the closed form at {ours[0]['reconstruction_error']:.4g}."
        )
    if o.batch != requested:
        notes.append(f"Batches of {requested:,} do not fit the published loop here: both sides ran with {o.batch:,}.")
    figures = {
        "stage1": {
            "closed_form_seconds": closed_form,
            "closed_form_error": ours[0]["reconstruction_error"],
            "published_seconds": stage1["seconds"],
            "published_error": stage1["error"],
            "published_epochs": stage1["epochs"],
            "published_batch": o.stage1_batch,
            "published_reached": stage1["reached"],
            "ratio_is_lower_bound": not stage1["reached"],
            "published_curve": stage1["curve"],
        },
        "stage3": {"rows_per_second": rates, "peak_bytes": peaks, "batch": o.batch, "batch_asked": requested},
        **{name: getattr(o, name) for name in ("rows", "hidden", "vocabulary", "rank", "spectrum", "dropout")},
        "head_dtype": {"ours": ours[0]["head_dtype"], "published": "float32"},
        "device": str(device),
        "threads": o.threads,
        "turns": o.repeats,
        "smoke": o.smoke,
        "notes": notes,
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Training of an adapter, relative to the published loop", ratios, AIMS, notes)
    for name in rates:
        console.print(f"{name}: {rates[name]:,.0f} rows/s, {peaks[name] / 2**20:,.0f} MiB")
    console.print(f"written: {path}")


def _turns(o: argparse.Namespace, data: Path) -> tuple[list[dict], list[dict], dict]:
    """Ours and the published loop in turns; the published stage 1 between the first turn and the second."""
    ours, published, stage1 = [], [], {}
    for turn in range(o.repeats):
        console.print(f"[dim]turn {turn + 1} of {o.repeats}, batches of {o.batch:,}[/]")
        published.append(_worker(o, "published_stage3", data))
        ours.append(_worker(o, "ours", data))
        if not stage1:
            o.target_error = ours[0]["reconstruction_error"]
            stage1 = _worker(o, "published_stage1", data)
    return ours, published, stage1


def _worker(o: argparse.Namespace, worker: str, data: Path) -> dict[str, Any]:
    skipped = {"worker", "data", "out", "gpu", "smoke", "scratch", "results_dir"}
    arguments = [f"--worker={worker}", f"--data={data}", *(["--gpu"] if o.gpu else [])]
    for name, value in vars(o).items():
        if name not in skipped and value is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return run_worker(__file__, arguments)


def _fitting(o: argparse.Namespace, device: torch.device) -> int:
    """The requested batch, halved until the published loop's logits, their softmax and their gradient fit."""
    free, batch = memory_available(device), o.batch
    while free is not None and batch > 1 and 3.2 * batch * o.vocabulary * 4 + MARGIN > free:
        batch //= 2
    return batch


# ── data ────────────────────────────────────────────────────────────────────


def _make_data(o: argparse.Namespace) -> dict[str, Any]:
    """Rows of unit mean square whose principal components fall off as a power law, any targets, a random head."""
    device_of(o)
    generator = np.random.default_rng(0)
    variance = np.arange(1, o.hidden + 1, dtype=np.float64) ** -o.spectrum
    scale_H = np.sqrt(variance * o.hidden / variance.sum())
    basis_HH, _ = np.linalg.qr(generator.standard_normal((o.hidden, o.hidden)))
    mixing_HH = (scale_H[:, None] * basis_HH.T).astype(np.float32)
    for split, rows in (("train", o.rows), ("dev", min(o.rows, DEV_ROWS))):
        key_NH = np.empty((rows, o.hidden), np.float32)
        for start in range(0, rows, 8192):
            size = min(8192, rows - start)
            key_NH[start : start + size] = generator.standard_normal((size, o.hidden), np.float32) @ mixing_HH
        np.save(o.data / f"{split}_key.npy", key_NH)
        np.save(o.data / f"{split}_target.npy", generator.integers(0, o.vocabulary, rows, np.int32))
    head = generator.standard_normal((o.vocabulary, o.hidden), np.float32) / math.sqrt(o.hidden)
    np.save(o.data / "head.npy", head.astype(np.float32))
    return {"rows": o.rows}


def _warm_up(device: torch.device) -> None:
    """Have the libraries loaded that a training step needs, so that they count as no one's memory."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    F.cross_entropy(F.dropout(x) @ x.T, torch.arange(64, device=device)).backward()
    torch.optim.Adam([x]).step()
    torch.linalg.eigh((x.detach() @ x.detach().T).double().cpu())


def _rates(marks: list[float], batch: int) -> float:
    """Rows per second of the median step; the first one warms up."""
    steps = [b - a for a, b in pairwise(marks)]
    return batch / median(steps[1:] or steps)


# ── ours ────────────────────────────────────────────────────────────────────


def _ours(o: argparse.Namespace) -> dict[str, Any]:
    """The whole of `Trainer.run`: closed form, validation, one epoch of stage 3, checkpoint."""
    device = device_of(o)
    train, dev = Block(o.data, "train"), Block(o.data, "dev")
    _warm_up(device)
    memory = PeakMemory(device)
    dtype = pick_dtype(o.dtype, device)
    weight = torch.from_numpy(np.load(o.data / "head.npy")).to(dtype)
    head = LMHead(HeadSpec("rms_norm", EPSILON), {"weight": weight, "norm_weight": torch.ones(o.hidden, dtype=dtype)})
    config = TrainConfig(
        rank=o.rank,
        space="pre_norm",  # as published, so that both sides reconstruct the same thing
        kappa=KAPPA,
        dropout=o.dropout,
        learning_rate=LEARNING_RATE,
        batch_size=o.batch,
        epochs=1,
        validate_every=10**9,
    )
    adapter = AdapterConfig(o.hidden, o.rank, "made up", "0" * 16, space="pre_norm", dropout=o.dropout, kappa=KAPPA)
    marks: list[float] = []

    def on_point(kind: str, point: Mapping[str, Any]) -> None:
        if kind == "train" or point["step"] == 0:
            marks.append(clock(device))

    with tempfile.TemporaryDirectory(dir=o.data) as folder:
        trainer = AdapterTrainer(
            adapter, config, head, train.rows, dev.rows, Path(folder), place=Place(device=device), on_point=on_point
        )
        history = trainer.run()
    return {
        "reconstruction_seconds": history.reconstruction_seconds,
        "reconstruction_error": history.reconstruction_error,
        "rows_per_second": _rates(marks, o.batch),
        "steps": len(marks) - 1,
        "peak_bytes": memory.taken(),
        "head_dtype": dtype_name(dtype),
    }


# ── as published ────────────────────────────────────────────────────────────


class PublishedMap(torch.nn.Module):
    """`B A x / R`: A kaiming uniform, B zero, dropout on the input."""

    def __init__(self, hidden: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.empty(rank, hidden))
        self.B = torch.nn.Parameter(torch.zeros(hidden, rank))
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = 1 / rank, dropout

    def down(self, x_NH: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(x_NH, self.dropout, self.training), self.A)

    def up(self, down_NR: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return F.linear(down_NR, B) * self.scale


def _published_stage1(o: argparse.Namespace) -> dict[str, Any]:
    """Adam, 1e-3 constant, rows in their order, until dev is as good as `--target-error` or a cap is met.

    The dev error is computed after each epoch, off the clock and without dropout.
    """
    device = device_of(o)
    torch.manual_seed(0)
    train, dev = Block(o.data, "train"), Block(o.data, "dev")
    model = PublishedMap(o.hidden, o.rank, o.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    seconds, curve, reached = 0.0, [], False
    for _epoch in range(o.stage1_epochs):
        started = clock(device)
        model.train()
        for x, _ in _batches(train, o.stage1_batch, device):
            loss = F.mse_loss(model.up(model.down(x), model.B), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += clock(device) - started
        error = _dev_error(model, dev, o.stage1_batch, device)
        curve.append({"seconds": seconds, "error": error})
        reached = error <= o.target_error
        if reached or seconds >= o.stage1_seconds:
            break
    return {"seconds": seconds, "epochs": len(curve), "error": curve[-1]["error"], "reached": reached, "curve": curve}


@torch.no_grad()
def _dev_error(model: PublishedMap, dev: Block, batch: int, device: torch.device) -> float:
    model.eval()
    total = sum(
        float((model.up(model.down(x), model.B) - x).square().sum(dtype=torch.float64))
        for x, _ in _batches(dev, batch, device)
    )
    return total / dev.key.size


def _published_stage3(o: argparse.Namespace) -> dict[str, Any]:
    """One epoch of the joint loss: A fresh, B_rct frozen, logits `[N, V]` whole in fp32."""
    device = device_of(o)
    torch.manual_seed(0)
    train = Block(o.data, "train")
    _warm_up(device)
    memory = PeakMemory(device)
    weight_VH = torch.from_numpy(np.load(o.data / "head.npy")).to(device)
    norm_H = torch.ones(o.hidden, device=device)
    model = PublishedMap(o.hidden, o.rank, o.dropout).to(device)
    B_rct = torch.randn(o.hidden, o.rank, device=device)  # stage 1's; its values do not change the work
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    marks = [clock(device)]
    for x, y in _batches(train, o.batch, device, whole_only=True):
        down_NR = model.down(x)
        h_pd = F.rms_norm(model.up(down_NR, model.B), (o.hidden,), norm_H, EPSILON)
        prediction = F.cross_entropy(F.linear(h_pd, weight_VH), y)  # no name keeps the logits longer than they must
        reconstruction = F.mse_loss(model.up(down_NR, B_rct), x)
        loss = KAPPA * reconstruction + (1 - KAPPA) * prediction
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del h_pd, down_NR, prediction, reconstruction, loss  # else the next batch's come on top of them
        marks.append(clock(device))
    return {"rows_per_second": _rates(marks, o.batch), "steps": len(marks) - 1, "peak_bytes": memory.taken()}


def _batches(
    rows: Block, batch: int, device: torch.device, whole_only: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(rows.target) - (batch - 1 if whole_only else 0), batch):
        key = torch.from_numpy(rows.key[start : start + batch]).to(device)
        yield key, torch.from_numpy(rows.target[start : start + batch].astype(np.int64)).to(device)


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "data": _make_data,
    "ours": _ours,
    "published_stage1": _published_stage1,
    "published_stage3": _published_stage3,
}

if __name__ == "__main__":
    main()
