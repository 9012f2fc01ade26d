"""What the line between the owners costs: builds over HTTPS beside builds in process, and steps beside extractions.

The PLM owner's real service runs in a Ray cluster of its own, behind TLS and a key. Both sides of a ratio extract the
same shards with the same requests, in turns; neither uses Ray on the data owner's side. H hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _harness import Aim, console, device_of, options, show, write_results
from _wire import Wire
from build_memory import PACKAGED, tiny_model

from pema_ray.data_owner.remote import RemotePLM
from pema_ray.line import ExtractBatch, PLMClient, Step, Stepped
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory.plan import ShardPlan
from pema_ray.memory.rows import rows_of_shard
from pema_ray.pema.demonstration.organisation import Organisation
from pema_ray.pema.demonstration.two_owners import PLM_PORT, set_up_plm_owner
from pema_ray.plm_owner import EngineConfig, LocalPLM
from pema_ray.plm_owner.service.access import Quota, add_client
from pema_ray.tasks import Prompter, load_pairs, load_task

NAME = "line"
AIMS: dict[str, Aim] = {
    "build_over_https_on_loopback_over_in_process": Aim(0.9),
    "build_over_50_ms_and_1_gbit_over_what_the_wire_allows": Aim(0.8),
    "bytes_over_the_wire_over_rows_times_H_times_b": Aim(1.02, at_most=True),
    "step_with_32_extractions_over_with_1": Aim(1.5, at_most=True),
}
ROUND_TRIP, BANDWIDTH = 0.05, 1e9  # seconds, bits a second
WINDOW = 4  # requests under way, as `build_memory.requests_in_flight`


# ── steps beside extractions ────────────────────────────────────────────────


async def step_latency(
    plm: PLMConfig, extractions: Sequence[int] = (0, 1, 8, 32), steps: int = 40, sequences: int = 32, tokens: int = 128
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of one token, by how many extractions of another owner are under way.

    Args:
        sequences, tokens: of each extraction; as soon as one is answered, the next is sent.
    """
    client = LocalPLM(plm, EngineConfig(slots=4, max_tokens=512))
    engine = await client.engine()
    batch = ExtractBatch([[5 + i % 90] * tokens for i in range(sequences)], [0] * sequences)
    latencies: dict[str, dict[str, float]] = {}

    async def extract_for_ever() -> None:
        while True:
            await engine.extract("another", batch, timeout=1e6)

    for count in extractions:
        running = [asyncio.create_task(extract_for_ever()) for _ in range(count)]
        await engine.step("one", [Step("it", 0, [5] * 200)])
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            (outcome,) = await engine.step("one", [Step("it", 200, [6])])
            seconds.append(time.perf_counter() - started)
            assert isinstance(outcome, Stepped)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        latencies[str(count)] = {"median": 1e3 * median(seconds), "90th percentile": 1e3 * quantiles(seconds, n=10)[-1]}
    await client.end()
    return latencies


# ── builds ──────────────────────────────────────────────────────────────────


async def shards_of(client: PLMClient, examples: int, per_shard: int) -> list[ShardPlan]:
    """The demonstration task's shards, as a build plans them."""
    bundle, task = await client.lm_head(), load_task("bible_modern")
    prompter = Prompter(bundle.tokenizer(), task, (), chat=bool(bundle.tokenizer().chat_template))
    pairs = load_pairs(task, {}, {"train": examples, "dev": 1, "test": 1}, 0)["train"]
    encoded = [prompter.encode_pair(pair) for pair in pairs]
    parts = [encoded[start : start + per_shard] for start in range(0, len(encoded), per_shard)]
    return [ShardPlan(f"shard-{n:05}", tuple(part)) for n, part in enumerate(parts)]


async def build(client: PLMClient, shards: Sequence[ShardPlan], eos: int) -> tuple[int, float]:
    """Rows of all shards, and seconds."""
    window, started = asyncio.Semaphore(WINDOW), time.perf_counter()
    built = await asyncio.gather(*(rows_of_shard(client, shard, eos, "float32", 2048, window) for shard in shards))
    return sum(len(rows) for rows, _, _ in built), time.perf_counter() - started


async def measure_builds(o: argparse.Namespace, plm: PLMConfig, folder: Path, key: str) -> dict[str, Any]:
    """Rows a second in process, over loopback, and over a long wire; and the bytes that crossed."""
    (folder / "key").write_text(key)
    local = LocalPLM(plm)
    card = (await local.describe()).card
    shards = await shards_of(local, o.examples, max(4, o.examples // 8))
    rates: dict[str, list[float]] = {"in process": [], "loopback": [], "long wire": []}
    files = {"key_file": str(folder / "key"), "ca_file": str(folder / "server.crt"), "timeout_seconds": 600}
    figures: dict[str, Any] = {"hidden_size": card.hidden_size}
    async with Wire("127.0.0.1", PLM_PORT) as near, Wire("127.0.0.1", PLM_PORT, ROUND_TRIP, BANDWIDTH) as far:
        for turn in range(o.rounds + 1):
            for name, wire in (("in process", None), ("loopback", near), ("long wire", far)):
                url = "" if wire is None else f"https://127.0.0.1:{wire.port}"
                client = local if wire is None else RemotePLM(PLMConfig(url=url, **files), card.fingerprint)
                await client.describe()
                before = near.sent + near.received
                rows, seconds = await build(client, shards, card.eos_token_ids[0])
                if turn:  # the first warms up
                    rates[name].append(rows / seconds)
                if wire is near:
                    figures["rows"], figures["bytes"] = rows, near.sent + near.received - before
                if wire is not None:
                    await client.end()
    batch = ExtractBatch([[5, 6, 7]], [0])
    figures["bytes_a_number"] = (await local.extract(batch)).element_size()
    await local.end()
    return figures | {"rows_per_second": {name: median(values) for name, values in rates.items()}, "all": rates}


def build_ratios(figures: dict[str, Any]) -> dict[str, float]:
    """The ratios of a build's figures."""
    rates, bytes_a_row = figures["rows_per_second"], figures["hidden_size"] * figures["bytes_a_number"]
    allowed = min(rates["in process"], BANDWIDTH / 8 / bytes_a_row)
    return {
        "build_over_https_on_loopback_over_in_process": rates["loopback"] / rates["in process"],
        "build_over_50_ms_and_1_gbit_over_what_the_wire_allows": rates["long wire"] / allowed,
        "bytes_over_the_wire_over_rows_times_H_times_b": figures["bytes"] / figures["rows"] / bytes_a_row,
    }


def main() -> None:
    parser = options("Builds over HTTPS beside builds in process, and steps beside extractions of another owner.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--examples", type=int, default=256, help="of the build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-builds", action="store_true", help="steps beside extractions alone")
    o = parser.parse_args()
    if o.smoke:
        o.steps, o.examples, o.rounds = 3, 8, 1
    device = device_of(o)
    with tempfile.TemporaryDirectory(prefix="line") as scratch:
        folder = Path(scratch)
        name = tiny_model(folder) if o.smoke else o.model
        plm = PLMConfig(name=name, device=str(device), threads=o.threads)
        latency = asyncio.run(step_latency(plm, steps=o.steps))
        ratios = {"step_with_32_extractions_over_with_1": latency["32"]["median"] / latency["1"]["median"]}
        figures: dict[str, Any] = {"step_milliseconds": latency, "device": str(device), "smoke": o.smoke}
        if not o.no_builds:
            owner = Organisation("plm_owner", folder / "plm_owner", "127.0.0.1")
            owner.folder.mkdir()
            service = set_up_plm_owner(owner, plm.model_dump())
            key = add_client(owner.folder / "keys.yaml", "benchmark", Quota())
            url, trusted = f"https://127.0.0.1:{PLM_PORT}/v1/model", owner.folder / "server.crt"
            console.print("starting the PLM owner's service")
            with owner.service(
                lambda: owner.request(url, "", key, trusted), "serve", "--topology", str(service), RAY_ADDRESS="local"
            ):
                figures |= asyncio.run(measure_builds(o, plm, owner.folder, key))
            ratios |= build_ratios(figures)
    write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("The line", ratios, AIMS)


if __name__ == "__main__":
    main()
