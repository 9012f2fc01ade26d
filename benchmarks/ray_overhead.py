"""What Ray costs, and what a second actor brings: a build and a training, on Ray and in one process.

Both sides do the whole job, with model loading but without starting the cluster and tokenising. The overhead is
constant, so its share falls as a job grows: seconds are reported beside the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from _harness import Aim, console, device_of, options, show, write_results
from build_memory import (
    CONFIG,
    PACKAGED,
    build_of,
    engine_settings,
    in_process,
    own_plm,
    packaged_examples,
    shards_of,
    tiny_model,
)

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.ray_training import AdapterTrainingJob, fit
from pema_ray.data_owner.training.trainer import AdapterTrainer
from pema_ray.line import LMHeadBundle
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import run_build
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.pema.config import load_config
from pema_ray.pema.plm import connector
from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.runtime.hardware import pick_dtype

NAME = "ray_overhead"
AIMS = {
    "build_two_actors_over_one": Aim(1.8),
    "build_on_ray_over_process_seconds": Aim(1.1, at_most=True),
    "train_on_ray_over_process_seconds": Aim(1.1, at_most=True),
}


def main() -> None:
    parser = options("Seconds that Ray adds to a build and to a training; what a second actor brings.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--examples-per-shard", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4, help="of training on the memory that was built")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--scratch", type=Path, default=None, help="where memories are written (default: temporary)")
    o = parser.parse_args()
    if o.smoke:
        o.pairs, o.examples_per_shard, o.epochs, o.rank = 12, 2, 1, 4
    with tempfile.TemporaryDirectory(prefix="ro", dir=o.scratch) as scratch:
        _measure(o, Path(scratch))


def _measure(o: argparse.Namespace, scratch: Path) -> None:
    device = device_of(o)
    name = tiny_model(scratch / "tiny") if o.smoke else o.model
    plm = PLMConfig(name=name, device=str(device), threads=o.threads)
    seconds: dict[str, float] = {}
    settings = BuildMemoryConfig(
        cpus_per_actor=o.threads,
        gpus_per_actor=int(o.gpu),
        examples_per_shard=o.examples_per_shard,
        max_batch_tokens=load_config(CONFIG).build_memory.max_batch_tokens,
    )
    with own_plm(plm, settings) as (_, _, loaded):  # once unmeasured: its file is then as warm as Ray's actors find it
        examples, card = packaged_examples(loaded.tokenizer(), load_config(CONFIG), o.pairs), loaded.card
        bundle = loaded.save(scratch / "lm_head")
    shards = shards_of(examples, card, settings)
    started = time.perf_counter()
    with own_plm(plm, settings) as (runner, client, _):
        runner.run(in_process(client, shards, card.eos_token_ids[0], settings, scratch))
        seconds["build_process"] = time.perf_counter() - started
    rows = sum(len(e.target) + 1 for e in examples)

    steady: dict[int, float] = {}
    with ray_cluster(RayConfig(num_cpus=max(4, o.threads + 2)), o.threads, int(o.gpu)):
        for folder, changes in (
            ("ray", {}),
            ("one", {"actors": 1, "cpus_per_actor": 1}),
            ("two", {"actors": 2, "cpus_per_actor": 1, "gpus_per_actor": int(o.gpu) / 2}),
        ):
            config = settings.model_copy(update=changes)
            threads = o.threads if folder == "ray" else 1
            build = build_of(scratch / folder, examples, card, config)
            started = time.perf_counter()
            own = plm.model_copy(update={"threads": threads})
            run_build(build, connector(own, card, config.cpus_per_actor, engine_settings(config)))
            seconds[f"build_{folder}"] = time.perf_counter() - started
            if folder != "ray":
                steady[config.actors] = _steady_rate(scratch / folder, config.actors)
        job = AdapterTrainingJob(
            train_memory=scratch / "ray",
            dev_memory=scratch / "one",
            bundle=bundle,
            run_dir=scratch / "run",
            adapter=AdapterConfig(card.hidden_size, o.rank, card.name, card.fingerprint),
            config=TrainConfig(rank=o.rank, epochs=o.epochs, validate_every=10**9, cpus_per_worker=o.threads),
        )
        started = time.perf_counter()
        fit(job)
        seconds["train_ray"] = time.perf_counter() - started
    started = time.perf_counter()
    loaded = LMHeadBundle.load(bundle)
    train, dev = (ExternalMemory.open(path).view() for path in (job.train_memory, job.dev_memory))
    head = loaded.head.to(pick_dtype("auto", device))
    AdapterTrainer(job.adapter, job.config, head, train, dev, scratch / "alone").run()
    seconds["train_process"] = time.perf_counter() - started

    ratios = {
        "build_two_actors_over_one": steady[2] / steady[1],
        "build_on_ray_over_process_seconds": seconds["build_ray"] / seconds["build_process"],
        "train_on_ray_over_process_seconds": seconds["train_ray"] / seconds["train_process"],
    }
    notes = [
        "Two actors have a thread each, and so has one; rates are from the first finished shards to the last.",
        "Seconds are of the whole job, model loading included; the cluster was up before.",
    ]
    figures = {
        "seconds": seconds,
        "rows_per_second": {f"{actors} actors of one thread": rate for actors, rate in steady.items()},
        "rows": rows,
        "pairs": o.pairs,
        "shards": len(shards),
        "epochs": o.epochs,
        "threads": o.threads,
        "device": str(device),
        "smoke": o.smoke,
        "notes": notes,
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("What Ray costs", ratios, AIMS, notes)
    console.print("  ".join(f"{name} {value:,.1f} s" for name, value in seconds.items()))
    console.print(f"written: {path}")


def _steady_rate(folder: Path, actors: int) -> float:
    """Rows per second once every actor has finished its first shard."""
    shards = {folder / info.name: info.rows for info in ExternalMemory.open(folder).manifest.shards}
    finished = sorted(shards, key=lambda path: path.stat().st_mtime_ns)
    span = (finished[-1].stat().st_mtime_ns - finished[actors - 1].stat().st_mtime_ns) / 1e9
    return sum(shards[path] for path in finished[actors:]) / span


if __name__ == "__main__":
    main()
