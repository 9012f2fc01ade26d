"""What each number format of an external memory costs: bytes, reading speed, and the dev loss of an adapter.

Every format is the same memory, converted. Reading is whole shards, in order, until their keys lie in memory; the first
reading of a memory checks each file's sha256 as well. Beside it `np.memmap` reads as many bytes of float32 in order:
copied into memory too, and only touched. Training is `Trainer.run` with one seed; the dev rows are float32 for all, so
that losses differ by the adapters alone. The files lie in the page cache: the format is measured, not the disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import Aim, console, device_of, options, show, write_results

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.trainer import AdapterTrainer
from pema_ray.line import LMHead, LMHeadBundle
from pema_ray.line.lm_head import HeadSpec
from pema_ray.memory import ExternalMemory, Manifest, MemoryRows
from pema_ray.memory.codec import KEY_DTYPES, KeyDtype, encode
from pema_ray.memory.external_memory import RowsView
from pema_ray.memory.manage import convert
from pema_ray.memory.shards import write_shard
from pema_ray.runtime.hardware import pick_dtype
from pema_ray.training.strategies import Place

NAME = "row_formats"
AIMS = {
    "bytes_int8": Aim(0.27, at_most=True),
    "dev_loss_int8": Aim(1.005, at_most=True),
    "dev_loss_float16": Aim(1.005, at_most=True),
    "dev_loss_bfloat16": Aim(1.005, at_most=True),
    "reading_over_memmap": Aim(0.5),
}


def main() -> None:
    o = _options()
    with tempfile.TemporaryDirectory(prefix="rf", dir=o.scratch) as scratch:
        _measure(o, Path(scratch))


def _options() -> argparse.Namespace:
    parser = options("Bytes, reading speed and dev loss of a memory's number formats.")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run folder with float32 memories")
    parser.add_argument("--pairs", type=int, default=1500, help="training pairs to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="readings of every format")
    parser.add_argument("--scratch", type=Path, default=None, help="where memories are written (default: temporary)")
    return parser.parse_args()


def _measure(o: argparse.Namespace, scratch: Path) -> None:
    device = device_of(o)
    train, dev, head, adapter = _made_up(scratch) if o.smoke else _of_run(o)
    first = ExternalMemory.open(train)
    shards = _enough(first, o.pairs)
    part = scratch / "float32"
    _keep(first, shards, part)
    formats: dict[KeyDtype, ExternalMemory] = {"float32": ExternalMemory.open(part)}
    for dtype in KEY_DTYPES[1:]:
        convert(part, scratch / dtype, dtype)
        formats[dtype] = ExternalMemory.open(scratch / dtype)
    raw = scratch / "raw.npy"
    np.concatenate([rows.key[:] for rows in formats["float32"].shards()]).tofile(raw)

    key_bytes = raw.stat().st_size
    speed, checked = {"memmap": median(_read_memmap(raw, copied=True) for _ in range(o.repeats))}, {}
    touched = median(_read_memmap(raw, copied=False) for _ in range(o.repeats))
    for dtype, memory in formats.items():
        checked[dtype] = median(_read(ExternalMemory.open(memory.folder)) for _ in range(o.repeats))
        speed[dtype] = median(_read(memory) for _ in range(o.repeats + 1))
    config = TrainConfig(rank=adapter.rank, epochs=o.epochs, validation_rows=8192, validate_every=10**9, resume=False)
    losses, rows = {}, 0
    for dtype, memory in formats.items():
        view = memory.view(max_examples=o.pairs)
        rows = len(view)
        losses[dtype] = _dev_loss(adapter, config, head.to(device), view, dev, scratch / f"train-{dtype}", device)
        console.print(f"{dtype}: dev loss {losses[dtype]:.5f}")
    size = {dtype: sum(shard.bytes for shard in memory.manifest.shards) for dtype, memory in formats.items()}

    ratios = {f"bytes_{dtype}": size[dtype] / size["float32"] for dtype in KEY_DTYPES[1:]}
    ratios |= {f"dev_loss_{dtype}": losses[dtype] / losses["float32"] for dtype in KEY_DTYPES[1:]}
    ratios["reading_over_memmap"] = speed["memmap"] / speed["float32"]
    ratios["first_reading_over_memmap"] = speed["memmap"] / checked["float32"]
    ratios["reading_over_memmap_touched"] = touched / speed["float32"]
    figures: dict[str, Any] = {
        "dev_loss": losses,
        "bytes": size,
        "seconds_to_read": speed,
        "seconds_to_read_and_check": checked,
        "key_bytes": key_bytes,
        "rows_read": sum(formats["float32"].counts),
        "rows_trained_on": rows,
        "pairs": o.pairs,
        "rank": adapter.rank,
        "epochs": o.epochs,
        "device": str(device),
        "threads": o.threads,
        "smoke": o.smoke,
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Number formats, relative to float32", ratios, AIMS)
    console.print("  ".join(f"{name} {key_bytes / seconds / 2**20:,.0f} MiB/s" for name, seconds in speed.items()))
    console.print(f"written: {path}")


def _of_run(o: argparse.Namespace) -> tuple[Path, RowsView, LMHead, AdapterConfig]:
    bundle = LMHeadBundle.load(o.run / "export_head" / "lm_head")
    card = bundle.card
    dev = ExternalMemory.open(o.run / "build_memory" / "dev", card).view()
    adapter = AdapterConfig(card.hidden_size, o.rank, card.name, card.fingerprint, dropout=0.1)
    return o.run / "build_memory" / "train", dev, bundle.head.to(pick_dtype("auto", device_of(o))), adapter


def _made_up(scratch: Path) -> tuple[Path, RowsView, LMHead, AdapterConfig]:
    """A memory of 600 rows of 16 numbers, and a head of 40 tokens."""
    random = np.random.default_rng(0)
    folder = scratch / "made-up"
    folder.mkdir()
    key = random.normal(size=(600, 16)).astype(np.float32)
    target = (key[:, :3] > 0) @ np.array([1, 2, 4])
    rows = MemoryRows(encode(key, "float32"), target.astype(np.int32), np.arange(600), np.zeros(600, np.int32))
    _write(folder, [("shard-00000.parquet", rows)], None)
    weight = torch.from_numpy(random.normal(size=(40, 16)).astype(np.float32))
    head = LMHead(HeadSpec("rms_norm", 1e-5), {"weight": weight, "norm_weight": torch.ones(16)})
    return folder, ExternalMemory.open(folder).view(), head, AdapterConfig(16, 8, "made up", "0" * 16)


def _enough(memory: ExternalMemory, pairs: int) -> int:
    """The number of shards that hold this many pairs."""
    examples = np.cumsum([shard.examples for shard in memory.manifest.shards])
    return int(np.searchsorted(examples, pairs)) + 1


def _keep(memory: ExternalMemory, shards: int, folder: Path) -> None:
    folder.mkdir()
    _write(folder, [(info.name, memory.shard(info)) for info in memory.manifest.shards[:shards]], memory.manifest)


def _write(folder: Path, parts: list[tuple[str, MemoryRows]], like: Manifest | None) -> None:
    from pema_ray.memory import ShardInfo

    shards = []
    for name, rows in parts:
        size, digest = write_shard(folder / name, rows)
        examples = len(np.unique(rows.example_id))
        shards.append(
            ShardInfo(
                name=name, rows=len(rows), examples=examples, tokens=0, padded_tokens=0, bytes=size, sha256=digest
            )
        )
    counts: dict[str, Any] = {"rows": sum(s.rows for s in shards), "examples": sum(s.examples for s in shards)}
    if like is None:
        like = Manifest(
            plm_name="made up",
            fingerprint="0" * 16,
            hidden_size=parts[0][1].key.shape[1],
            vocab_size=40,
            eos_token_id=1,
            task="made up",
            split="train",
            context="teacher_forced",
            key_dtype="float32",
            plan_hash="0" * 16,
            shards=tuple(shards),
            **counts,
        )
    like.model_copy(update={**counts, "shards": tuple(shards)}).save(folder)


def _read(memory: ExternalMemory) -> float:
    """Seconds to read every shard and have its keys as float32; a memory just opened checks its files as well."""
    started = time.perf_counter()
    for rows in memory.shards():
        rows.key[:]
    return time.perf_counter() - started


def _read_memmap(path: Path, copied: bool) -> float:
    """Seconds to copy as many bytes into memory in order, or to add them up without keeping them."""
    started = time.perf_counter()
    numbers = np.memmap(path, np.float32, "r")
    for start in range(0, len(numbers), 2**22):
        block = numbers[start : start + 2**22]
        np.array(block) if copied else float(block.sum())
    return time.perf_counter() - started


def _dev_loss(
    adapter: AdapterConfig, config: TrainConfig, head: LMHead, train: RowsView, dev: RowsView, folder: Path, device
) -> float:
    history = AdapterTrainer(adapter, config, head, train, dev, folder, place=Place(device=device)).run()
    return history.best_loss


if __name__ == "__main__":
    main()
