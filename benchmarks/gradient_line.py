"""What the gradient line costs: a step of a prefix's training over HTTPS beside a bare forward and backward pass.

The PLM owner's real service runs in a Ray cluster of its own, behind TLS and a key, on this machine. Both sides take
the same batch and the same prefix, in turns. n positions, N rows, H hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _harness import Aim, PeakMemory, console, device_of, options, reporting_to, run_worker, show, write_results
from _wire import Wire
from build_memory import PACKAGED, tiny_model
from transformers import DynamicCache

from pema_ray.data_owner.remote import RemotePLM
from pema_ray.line import ExtractBatch, Step, Stepped
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import AdaptablePLM, PLMClient
from pema_ray.pema.demonstration.organisation import Organisation
from pema_ray.pema.demonstration.two_owners import PLM_PORT, set_up_plm_owner
from pema_ray.plm_owner import EngineConfig, LocalPLM
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.plm_owner.service.access import Quota, add_client

NAME = "gradient_line"
AIMS: dict[str, Aim] = {
    "step_over_https_over_bare_forward_and_backward": Aim(1.15, at_most=True),
    "decoding_behind_a_prefix_over_without": Aim(0.95),
}
SESSIONS = 16


def batch_of(sequences: int, tokens: int, rows: int) -> ExtractBatch:
    """Sequences of which the last `rows` positions are requested."""
    ids = [[5 + (7 * i + j) % 90 for j in range(tokens)] for i in range(sequences)]
    return ExtractBatch(ids, [tokens - rows] * sequences)


# ── training ────────────────────────────────────────────────────────────────


def bare_step(plm: LoadedPLM, prefix: Prefix, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
    """The gradient of the prefix in one process, one pass forward and one backward; all sequences have one length."""
    embeddings = prefix.embeddings.to(plm.device).requires_grad_()
    cache: Any = DynamicCache(config=plm.model.config)
    for number, layer in enumerate(prefix.replaced(embeddings).keys_and_values()):
        keys, values = (rows.to(plm.model.dtype).expand(len(batch.token_ids), -1, -1, -1) for rows in layer)
        cache.update(keys, values, number)
    ids = torch.tensor(batch.token_ids, device=plm.device)
    state_BTH = capture_state(plm, input_ids=ids, past_key_values=cache, use_cache=True)
    state_NH = state_BTH[:, batch.first[0] :].flatten(0, 1)
    return torch.autograd.grad(state_NH, embeddings, d_state_NH.to(state_NH))[0].cpu()


async def remote_step(
    client: AdaptablePLM, prefix: Prefix, batch: ExtractBatch, d_state_NH: torch.Tensor
) -> dict[str, float]:
    """Seconds of a step's three calls."""
    asked, seconds = replace(batch, handle=prefix.handle, for_gradient=True), {}
    for name, call in (
        ("put", lambda: client.put_prefix(prefix)),
        ("extract", lambda: client.extract(asked)),
        ("gradient", lambda: client.gradient(asked, d_state_NH)),
    ):
        started = time.perf_counter()
        await call()
        seconds[name] = time.perf_counter() - started
    return seconds


async def measure_steps(o: argparse.Namespace, config: PLMConfig, folder: Path, key: str) -> dict[str, Any]:
    """Seconds of a bare step and of a step over the line, in turns, and the bytes that cross."""
    (folder / "key").write_text(key)
    plm = load_plm(config)
    batch = batch_of(o.sequences, o.tokens, o.rows)
    files = {"key_file": str(folder / "key"), "ca_file": str(folder / "server.crt"), "timeout_seconds": 600}
    names = ("bare", "put", "extract", "gradient", "gradient_recomputed")
    taken: dict[str, list[float]] = {name: [] for name in names}
    async with Wire("127.0.0.1", PLM_PORT) as wire:
        remote = RemotePLM(PLMConfig(url=f"https://127.0.0.1:{wire.port}", **files))
        prefix = await remote.read_prefix([5 + i % 90 for i in range(o.positions)])
        dtype = plm.model.dtype  # as in training
        prefix = prefix.replaced(prefix.embeddings.to(dtype))
        d_state_NH = 1e-3 * torch.randn(batch.rows, (await remote.describe()).card.hidden_size).to(dtype)
        figures: dict[str, Any] = {}
        for turn in range(o.rounds + 1):
            changed = prefix.replaced(prefix.embeddings + 0.01 * turn)  # as after a step of training
            started = time.perf_counter()
            await asyncio.to_thread(bare_step, plm, changed, batch, d_state_NH)
            bare = time.perf_counter() - started
            sent, received = wire.sent, wire.received
            seconds = await remote_step(remote, changed, batch, d_state_NH)
            figures = {"bytes_sent": wire.sent - sent, "bytes_received": wire.received - received}
            started = time.perf_counter()
            await remote.gradient(replace(batch, handle=changed.handle), d_state_NH)  # its graph is gone
            seconds["gradient_recomputed"] = time.perf_counter() - started
            if turn:  # the first warms up
                taken["bare"].append(bare)
                for name, value in seconds.items():
                    taken[name].append(value)
        await remote.end()
    numbers = {"prefix": prefix.embeddings.numel(), "states": d_state_NH.numel(), "tokens": batch.tokens}
    return figures | {"seconds": {name: median(values) for name, values in taken.items()}, "numbers": numbers}


# ── decoding ────────────────────────────────────────────────────────────────


async def measure_decoding(o: argparse.Namespace, config: PLMConfig) -> dict[str, float]:
    """Tokens a second of `SESSIONS` sessions that decode together, behind a prefix and without, in turns."""
    client: PLMClient = LocalPLM(config, EngineConfig(slots=2 * SESSIONS, max_tokens=1024))
    assert isinstance(client, AdaptablePLM)
    prefix = await client.read_prefix([5 + i % 90 for i in range(o.positions)])
    await client.put_prefix(prefix)
    prompt = [5 + i % 90 for i in range(o.tokens)]
    rates: dict[str, list[float]] = {"without": [], "behind": []}
    for turn in range(o.rounds + 1):
        for name, handle in (("without", ""), ("behind", prefix.handle)):
            names = [f"{name} {n}" for n in range(SESSIONS)]
            await client.step([Step(session, 0, prompt, handle=handle) for session in names])
            started = time.perf_counter()
            for position in range(o.steps):
                outcomes = await client.step([Step(session, len(prompt) + position, [6]) for session in names])
                assert all(isinstance(outcome, Stepped) for outcome in outcomes)
            if turn:
                rates[name].append(SESSIONS * o.steps / (time.perf_counter() - started))
            await client.close(names)
    await client.end()
    return {name: median(values) for name, values in rates.items()}


# ── memory, in a process of its own ─────────────────────────────────────────


async def peak_of_a_gradient(o: argparse.Namespace, config: PLMConfig, device: torch.device) -> int:
    """Bytes that the engine takes for the graph of one batch, and its gradient, beyond the loaded PLM."""
    client = LocalPLM(config)
    prefix = await client.read_prefix([5 + i % 90 for i in range(o.positions)])
    await client.put_prefix(prefix)
    batch = replace(batch_of(o.sequences, o.tokens, o.rows), handle=prefix.handle)
    d_state_NH = 1e-3 * torch.randn(batch.rows, (await client.describe()).card.hidden_size)
    await client.extract(batch)
    peak = PeakMemory(device)
    await client.extract(replace(batch, for_gradient=True))
    await client.gradient(batch, d_state_NH)
    taken = peak.taken()
    await client.end()
    return taken


def main() -> None:
    parser = options("Training a prefix over HTTPS beside a bare forward and backward pass.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument("--positions", type=int, default=208, help="of the prefix")
    parser.add_argument("--sequences", type=int, default=32, help="of a batch")
    parser.add_argument("--tokens", type=int, default=64, help="of each sequence")
    parser.add_argument("--rows", type=int, default=25, help="requested of each sequence")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.smoke:
        o.positions, o.sequences, o.tokens, o.rows, o.steps, o.rounds = 6, 3, 8, 3, 2, 1
    device = device_of(o)
    with tempfile.TemporaryDirectory(prefix="gradient_line") as scratch:
        folder = Path(scratch)
        name = tiny_model(folder) if o.smoke else o.model
        plm = PLMConfig(name=name, device=str(device), threads=o.threads)
        if o.out is not None:
            with reporting_to(o.out) as report:
                report["peak_bytes"] = asyncio.run(peak_of_a_gradient(o, plm, device))
            return
        owner = Organisation("plm_owner", folder / "plm_owner", "127.0.0.1")
        owner.folder.mkdir()
        service = set_up_plm_owner(owner, plm.model_dump(), adaptation="prefix")
        key = add_client(owner.folder / "keys.yaml", "benchmark", Quota())
        url, trusted = f"https://127.0.0.1:{PLM_PORT}/v1/model", owner.folder / "server.crt"
        console.print("starting the PLM owner's service")
        with owner.service(
            lambda: owner.request(url, "", key, trusted), "serve", "--topology", str(service), RAY_ADDRESS="local"
        ):
            figures = asyncio.run(measure_steps(o, plm, owner.folder, key))
        rates = asyncio.run(measure_decoding(o, plm))
        sizes = [f"--{size}={getattr(o, size)}" for size in ("positions", "sequences", "tokens", "rows", "threads")]
        flags = [flag for flag, on in (("--smoke", o.smoke), ("--gpu", o.gpu)) if on]
        peak = run_worker(__file__, [*sizes, *flags, f"--model={o.model}"])["peak_bytes"]
    seconds = figures["seconds"]
    step = seconds["put"] + seconds["extract"]
    ratios = {
        "step_over_https_over_bare_forward_and_backward": (step + seconds["gradient"]) / seconds["bare"],
        "step_recomputed_over_bare_forward_and_backward": (step + seconds["gradient_recomputed"]) / seconds["bare"],
        "decoding_behind_a_prefix_over_without": rates["behind"] / rates["without"],
    }
    figures |= {"tokens_per_second": rates, "peak_bytes": peak, "device": str(device), "smoke": o.smoke}
    write_results(NAME, ratios, AIMS, figures, o.results_dir)
    note = (
        "A step puts the prefix, asks for representations, and for the gradient; recomputed: their graph was not kept."
    )
    show("The gradient line", ratios, AIMS, [note])


if __name__ == "__main__":
    main()
