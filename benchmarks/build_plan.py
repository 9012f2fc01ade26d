"""What a build of many pairs costs the process that plans it: its peak memory, and its time.

The pairs are short and synthetic; the PLM is a stub that answers in the right shapes. All else is real: the prepared
Parquet, its hash, the counting of every shard by Ray tasks, and with `--build` the whole pipeline.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _harness import Aim, PeakMemory, console, device_of, options, reporting_to, run_worker, show, write_results

from pema_ray.line import LMHead, LMHeadBundle, ModelCard
from pema_ray.line.lm_head import HeadSpec
from pema_ray.memory.build import run_build
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import PreparedPairs, Wording
from pema_ray.memory.planning import find_or_make_plan
from pema_ray.memory.specification import MemoryBuild
from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.tasks import Task

NAME = "build_plan"
CARD = ModelCard("stub", "5" * 16, 16, 512, 4096, (1,))
TASK = Task(name="made up", template="Old: {source}\nNew:", sacrebleu_language="en")
ROWS_AT_ONCE = 8192
AIMS = {"peak_over_a_gibibyte": Aim(1.0, at_most=True)}


def main() -> None:
    parser = options("Peak memory and seconds of planning a build.")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="the full size is 10,000,000")
    parser.add_argument("--examples-per-shard", type=int, default=256)
    parser.add_argument("--build", action="store_true", help="go on to build the memory with the stub")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=None, help="where pairs and rows are written")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.smoke:
        o.pairs, o.examples_per_shard, o.build = 600, 50, True
    device_of(o)
    if o.worker:
        with reporting_to(o.out) as report:
            report |= _driver(o)
        return
    with tempfile.TemporaryDirectory(prefix="bp", dir=o.scratch) as scratch:
        prepare(Path(scratch), o.pairs)
        arguments = [f"--pairs={o.pairs}", f"--examples-per-shard={o.examples_per_shard}", f"--actors={o.actors}"]
        flags = [*(["--build"] if o.build else []), f"--threads={o.threads}", f"--scratch={scratch}"]
        result = run_worker(__file__, ["--worker", *arguments, *flags])
    ratios = {"peak_over_a_gibibyte": result["peak_bytes"] / 2**30}
    notes = ["Peak of the driver, libraries and Ray's own books included; tasks and actors are other processes."]
    figures = {
        **result,
        "pairs": o.pairs,
        "examples_per_shard": o.examples_per_shard,
        "built": o.build,
        "actors": o.actors,
        "threads": o.threads,
        "smoke": o.smoke,
        "notes": notes,
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show(f"Planning {o.pairs:,} pairs", ratios, AIMS, notes)
    console.print("  ".join(f"{name} {value:,.0f}" for name, value in result.items()))
    console.print(f"written: {path}")


def _driver(o: argparse.Namespace) -> dict[str, Any]:
    """The measured process: plans, and builds if asked to."""
    memory = PeakMemory(torch.device("cpu"))
    settings = BuildMemoryConfig(examples_per_shard=o.examples_per_shard, actors=o.actors, cpus_per_actor=0.5)
    pairs = PreparedPairs(o.scratch / "train.parquet", Wording(o.scratch / "lm_head", TASK))
    build = MemoryBuild(o.scratch / "memory", pairs, CARD, TASK.name, "train", settings)
    result: dict[str, Any] = {"shards": build.shards}
    with ray_cluster(RayConfig(num_cpus=max(3, o.threads + 1)), settings.cpus_per_actor, readers=1):
        result["imported_and_connected_bytes"] = memory.baseline + memory.taken()
        started = time.perf_counter()
        assert build.plan_hash
        result["hash_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        result["planned_rows"] = sum(find_or_make_plan(build).rows)
        result["plan_seconds"] = time.perf_counter() - started
        result["planned_peak_bytes"] = memory.baseline + memory.taken()
        if o.build:
            started = time.perf_counter()
            result["rows"] = run_build(build, stub(CARD.hidden_size)).rows
            result["build_seconds"] = time.perf_counter() - started
    return result | {"peak_bytes": memory.baseline + memory.taken()}


def stub(hidden: int) -> Callable[[], Any]:
    """Makes a PLM that answers zeros of the right shape; a closure, so that it travels to actors by value."""

    def make() -> Any:
        import torch

        class Stub:
            async def extract(self, batch: Any) -> torch.Tensor:
                return torch.zeros(batch.rows, hidden)

            async def end(self) -> None:
                """Nothing is held."""

        return Stub()

    return make


def prepare(folder: Path, pairs: int) -> None:
    """`train.parquet` and an LM-head bundle with a tokenizer of bytes, written without holding the pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        files = {path.name: path.read_bytes() for path in Path(saved).iterdir()}
    head = LMHead(HeadSpec("identity"), {"weight": torch.zeros(CARD.vocab_size, CARD.hidden_size)})
    LMHeadBundle(CARD, head, files).save(folder / "lm_head")
    schema = pa.schema({"example_id": pa.int64(), "source": pa.string(), "target": pa.string()})
    with pq.ParquetWriter(folder / "train.parquet", schema) as writer:
        for begin in range(0, pairs, ROWS_AT_ONCE):
            numbers = range(begin, min(pairs, begin + ROWS_AT_ONCE))
            sources, targets = [f"And he said: {n}." for n in numbers], [f"He said {n % 97}." for n in numbers]
            writer.write_table(pa.table([list(numbers), sources, targets], schema=schema))


if __name__ == "__main__":
    main()
