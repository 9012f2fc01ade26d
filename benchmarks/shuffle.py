"""How good windows of shards are beside a perfect shuffle: dev loss of the same training, fed in three orders.

`global` permutes all rows in every epoch; `window` shuffles the rows of a few shards together, as memories larger than
a worker need it; a window of one shard is the worst case: rows of a batch come from neighbouring examples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from _harness import Aim, console, device_of, options, show, write_results

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.trainer import AdapterTrainer
from pema_ray.line import LMHeadBundle
from pema_ray.memory import ExternalMemory
from pema_ray.runtime.hardware import pick_dtype
from pema_ray.training.strategies import Place

NAME = "shuffle"
AIMS = {"window_over_global": Aim(1.005, at_most=True), "one_shard_over_global": Aim(1.02, at_most=True)}


def main() -> None:
    parser = options("Dev loss by the order in which rows are fed.")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run folder with memories")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256, help="small: a window's rest, less than a batch, is left out")
    parser.add_argument("--window", type=int, default=4, help="shards shuffled together")
    parser.add_argument("--seeds", type=int, default=2)
    o = parser.parse_args()
    if o.smoke:
        o.rank, o.seeds = 4, 1
    _measure(o)


def _measure(o: argparse.Namespace) -> None:
    device = device_of(o)
    bundle = LMHeadBundle.load(o.run / "export_head" / "lm_head")
    memory = ExternalMemory.open(o.run / "build_memory" / "train", bundle.card)
    dev = ExternalMemory.open(o.run / "build_memory" / "dev", bundle.card).view(max_rows=4096)
    head = bundle.head.to(pick_dtype("auto", device))
    adapter = AdapterConfig(bundle.card.hidden_size, o.rank, bundle.card.name, bundle.card.fingerprint, residual=True)
    losses: dict[str, list[float]] = {"global": [], "window": [], "one_shard": []}
    steps: dict[str, int] = {}
    for seed in range(o.seeds):
        for order, order_losses in losses.items():
            config = TrainConfig(
                rank=o.rank,
                residual=True,
                epochs=o.epochs,
                batch_size=o.batch,
                final_learning_rate=1e-4,
                validate_every=10**9,
                shuffle="global" if order == "global" else "window",
                window_shards=1 if order == "one_shard" else o.window,
            )
            rows = memory.view() if order == "global" else memory
            with tempfile.TemporaryDirectory() as folder:
                place = Place(device=device)
                history = AdapterTrainer(adapter, config, head, rows, dev, Path(folder), seed, place).run()
            order_losses.append(history.validation[-1]["prediction"])
            steps[order] = history.total_steps
            console.print(f"[dim]seed {seed}, {order}: {order_losses[-1]:.4f}[/]")
    ratios = {
        "window_over_global": mean(losses["window"]) / mean(losses["global"]),
        "one_shard_over_global": mean(losses["one_shard"]) / mean(losses["global"]),
    }
    figures = {
        "dev_loss": losses,
        "steps": steps,
        "rows": len(memory),
        "shards": len(memory.counts),
        **{name: getattr(o, name) for name in ("window", "epochs", "rank", "batch", "seeds", "threads", "smoke")},
        "device": str(device),
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Dev loss by shuffle", ratios, AIMS)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
