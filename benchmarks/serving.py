"""What serving costs and brings: many sessions against one, against `generate` and against the published loop, PEMA on
against off, drafts, the line in a cluster.

The PLM owner's engine and the data owner's decoder run in one process, with the line's bytes between them and, for
drafts, a round trip as long as between two organisations. Every answer is greedy; speeds are of whole answers, prompts
included. Answers of the first three ratios are all of one length.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _harness import Aim, console, device_of, options, show, write_results
from build_memory import CONFIG, PACKAGED, packaged_examples, tiny_model
from transformers import DynamicCache

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding import Decoder, GenerationRequest, Predictor
from pema_ray.data_owner.decoding.drafts import MemoryLookup
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix
from pema_ray.errors import UserError
from pema_ray.line import Description, LMHeadBundle, Step, Stepped, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory import ExternalMemory
from pema_ray.pema.config import load_config
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.plm_owner.service.deployment import PLMEngine

NAME = "serving"
AIMS: dict[str, Aim] = {  # the published loop has no number of its own to reach
    "many_sessions_over_one": Aim(5),
    "engine_over_generate": Aim(0.95),
    "pema_over_plm_alone": Aim(0.9),
    "drafted_over_not": Aim(1.5),
    "drafted_over_not_50ms": Aim(3),
    "line_in_cluster_adds_ms": Aim(2, at_most=True),
}


class Line:
    """The line in one process: a `PLMClient` that waits a round trip before it answers."""

    def __init__(self, engine: PLMEngine, fingerprint: str, round_trip: float = 0.0) -> None:
        self.engine, self.fingerprint, self.round_trip = engine, fingerprint, round_trip
        self.owner = f"benchmark {uuid.uuid4()}"  # a new one finds nothing of what was computed for others

    async def describe(self) -> Description:
        return await self.engine.describe()

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        await asyncio.sleep(self.round_trip)
        _, body = await self.engine.step(self.owner, codec.encode_steps(steps, self.fingerprint))
        return codec.decode_stepped(body, UserError)

    async def close(self, sessions: Sequence[str]) -> None:
        await self.engine.close(self.owner, sessions)


def main() -> None:
    parser = options("Tokens a second of served answers.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument(
        "--adapter", type=Path, default=None, help="a trained adapter (default: one that changes nothing)"
    )
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument(
        "--drafts", type=int, default=8, help="answers that drafts are measured on, one after the other"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=Path, default=None, help="a memory that drafts are taken from, too")
    parser.add_argument("--lambda-max", type=float, default=0.9)
    parser.add_argument("--no-cluster", action="store_true", help="leave the line in a cluster out")
    o = parser.parse_args()
    if o.smoke:
        o.sessions, o.tokens, o.drafts, o.repeats = 3, 4, 2, 1
    with tempfile.TemporaryDirectory(prefix="serving") as scratch:
        asyncio.run(_measure(o, Path(scratch)))


async def _measure(o: argparse.Namespace, scratch: Path) -> None:
    device = device_of(o)
    model = tiny_model(scratch / "tiny") if o.smoke else o.model
    plm = PLMConfig(name=model, device=str(device), threads=o.threads)
    loaded = load_plm(plm)
    bundle = export_lm_head(loaded)
    examples = packaged_examples(bundle.tokenizer(), load_config(CONFIG), max(o.sessions, o.drafts))
    prompts = [example.prompt for example in examples]
    adapter = _adapter(o.adapter, bundle)
    settings = {"slots": o.sessions + 1, "max_tokens": max(map(len, prompts)) + max(o.tokens, 128)}
    engine = PLMEngine(plm.model_dump(), settings)
    await engine.describe()
    figures: dict[str, Any] = {}

    batch = prompts[: o.sessions]
    speeds: dict[str, list[float]] = {}
    for _ in range(o.repeats):  # in turns
        for side, side_prompts, with_adapter in (
            ("many", batch, True),
            ("one", batch[:1], True),
            ("plm alone", batch, False),
        ):
            requests = [_request(p, o.tokens, "it" if with_adapter else None) for p in side_prompts]
            line = Line(engine, bundle.card.fingerprint)
            speed, latencies = await _run(line, bundle, adapter, requests, eos=False, together=True)
            speeds.setdefault(side, []).append(speed)
            if side == "many":
                figures["milliseconds"] = latencies
        speeds.setdefault("generate", []).append(_generate(loaded, batch, o.tokens))
        speeds.setdefault("published loop", []).append(_published(loaded, bundle, adapter, batch, o.tokens, scratch))
    speed = {side: median(values) for side, values in speeds.items()}
    ratios = {
        "many_sessions_over_one": speed["many"] / speed["one"],
        "engine_over_generate": speed["plm alone"] / speed["generate"],
        "pema_over_plm_alone": speed["many"] / speed["plm alone"],
        "engine_over_published_loop": speed["many"] / speed["published loop"],
    }
    memory = None if o.memory is None else MemoryLookup.of(ExternalMemory.open(o.memory, bundle.card))
    drafts: dict[str, Any] = {}
    for suffix, round_trip in (("", 0.0), ("_50ms", 0.05)):
        by_draft: dict[int, list[float]] = {0: [], 12: []}
        for _ in range(o.repeats):
            for draft, speeds_of_draft in by_draft.items():
                tokens = 4 if o.smoke else 64
                requests = [_request(p, tokens, "it", draft, o.lambda_max) for p in prompts[: o.drafts]]
                line = Line(engine, bundle.card.fingerprint, round_trip)
                counts: Counter[str] = Counter()
                speed_, _ = await _run(
                    line, bundle, adapter, requests, eos=True, together=False, memory=memory, counts=counts
                )
                speeds_of_draft.append(speed_)
                drafts[f"{draft}{suffix}"] = dict(counts)
        speed |= {f"draft {draft}{suffix}": median(values) for draft, values in by_draft.items()}
        ratios[f"drafted_over_not{suffix}"] = median(by_draft[12]) / median(by_draft[0])
    await engine.plm.end()
    if not o.no_cluster:
        figures["line_milliseconds"] = line = await _line_in_a_cluster(scratch, 100 if o.smoke else 1000)
        ratios["line_in_cluster_adds_ms"] = line["in a cluster, median"] - line["in one process, median"]
    figures |= {
        "drafts": drafts,
        "memory": None if o.memory is None else _short(o.memory),
        "tokens_per_second": speed,
        "sessions": o.sessions,
        "tokens": o.tokens,
        "adapter": _short(o.adapter) if o.adapter else "none that was trained",
        "prompt_tokens": median(map(len, batch)),
        "device": str(device),
        "threads": o.threads,
        "smoke": o.smoke,
    }
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("Serving", ratios, AIMS)
    console.print("tokens/s: " + "  ".join(f"{name} {value:.1f}" for name, value in speed.items()))
    console.print(
        "milliseconds: " + "  ".join(f"{name} {value:.0f}" for name, value in figures["milliseconds"].items())
    )
    console.print(f"written: {path}")


def _short(folder: Path) -> str:
    """A run's folder and the artefact in it, whatever machine they lie on."""
    return "/".join(folder.absolute().parts[-3:])


def _adapter(folder: Path | None, bundle: LMHeadBundle) -> PemaAdapter:
    if folder is not None:
        return PemaAdapter.from_pretrained(folder, bundle.card).eval()
    card = bundle.card
    rank = min(512, card.hidden_size)
    return PemaAdapter(AdapterConfig(card.hidden_size, rank, card.name, card.fingerprint, residual=True)).eval()


def _request(
    prompt: list[int], tokens: int, adapter: str | None, draft: int = 0, lam: float = 0.9
) -> GenerationRequest:
    return GenerationRequest(prompt, tokens, UnrollingSchedule(lam), adapter, tokens, draft=draft)


async def _run(
    line: Any,
    bundle: LMHeadBundle,
    adapter: PemaAdapter,
    requests: Sequence[GenerationRequest],
    eos: bool,
    together: bool,
    memory: MemoryLookup | None = None,
    counts: Counter[str] | None = None,
) -> tuple[float, dict[str, float]]:
    """Tokens a second, and milliseconds to the first token and between tokens."""
    decoder = Decoder(line, bundle.head, bundle.tokenizer(), bundle.card.eos_token_ids if eos else ())
    decoder.allow_plm_drafts(12)
    decoder.predictors = {"it": Predictor(bundle.head, adapter)}
    decoder.memories = {} if memory is None else {"it": memory}
    times: list[list[float]] = []

    async def answer(request: GenerationRequest) -> None:
        arrivals = [time.perf_counter()]
        async for _ in decoder.answer(request, timeout=3600):
            arrivals.append(time.perf_counter())
        times.append(arrivals)

    started = time.perf_counter()
    if together:
        await asyncio.gather(*(answer(request) for request in requests))
    else:
        for request in requests:
            await answer(request)
    seconds = time.perf_counter() - started
    if counts is not None:
        counts.update(decoder.counts)
    await decoder.stop()
    first = [arrivals[1] - arrivals[0] for arrivals in times]
    between = sorted(b - a for arrivals in times for a, b in pairwise(arrivals[1:]))
    milliseconds = {
        "to the first token, median": 1e3 * median(first),
        "a token, median": 1e3 * median(between) if between else 0.0,
        "a token, 99th percentile": 1e3 * between[int(0.99 * (len(between) - 1))] if between else 0.0,
    }
    return sum(len(arrivals) - 1 for arrivals in times) / seconds, milliseconds


@torch.inference_mode()
def _generate(plm: LoadedPLM, prompts: Sequence[list[int]], tokens: int) -> float:
    """Tokens a second of transformers' own greedy `generate` on the same prompts, padded on their left."""
    model, longest = plm.model, max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device = plm.device
    started = time.perf_counter()
    out = model.generate(
        ids.to(device), attention_mask=mask.to(device), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )
    seconds = time.perf_counter() - started
    assert out.shape[1] == longest + tokens
    return len(prompts) * tokens / seconds


@torch.inference_mode()
def _published(
    plm: LoadedPLM,
    bundle: LMHeadBundle,
    adapter: PemaAdapter,
    prompts: Sequence[list[int]],
    tokens: int,
    to: Path,
) -> float:
    """Tokens a second of the published loop, as described: it reads head and adapter again for every batch, computes
    both distributions for all rows in every step, and computes the prompts' common beginning for each prompt."""
    stored = to / "published.pt"
    if not stored.exists():
        torch.save({"head": bundle.head.weight, "A": adapter.A.detach(), "B": adapter.B_pd.detach()}, stored)
    device, longest = plm.device, max(map(len, prompts))
    started = time.perf_counter()
    tensors = torch.load(stored, map_location=device, weights_only=True)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask, cache = ids.to(device), mask.to(device), DynamicCache(config=plm.model.config)
    for _ in range(tokens):
        state_BH = capture_state(
            plm, input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :],
        )[:, -1]  # fmt: skip
        x = bundle.head.norm(state_BH)
        log_plm = (x.to(tensors["head"].dtype) @ tensors["head"].T).float().log_softmax(-1)
        h = x.float() + x.float() @ tensors["A"].T @ tensors["B"].T
        log_pema = (h.to(tensors["head"].dtype) @ tensors["head"].T).float().log_softmax(-1)
        ids = mix(log_pema, log_plm, torch.full((len(prompts),), 0.9)).argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        ids.tolist()  # as each token is looked at for the end of its answer
    return len(prompts) * tokens / (time.perf_counter() - started)


# ── the line in a cluster ───────────────────────────────────────────────────────


async def _one_by_one(client: Any, count: int) -> list[float]:
    """Seconds of steps of one token, one after the other, of a session that is 200 tokens long."""
    await client.step([Step("it", 0, [5] * 200)])
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        (outcome,) = await client.step([Step("it", 199, [6])])
        seconds.append(time.perf_counter() - started)
        assert isinstance(outcome, Stepped)
    await client.close(["it"])
    return seconds[count // 10 :]


async def _line_in_a_cluster(scratch: Path, count: int) -> dict[str, float]:
    """Milliseconds of a step from one replica of Serve to another, and in one process; of a model that costs little."""
    import ray
    from ray import serve

    from pema_ray.plm_owner.engine import EngineConfig
    from pema_ray.plm_owner.service.application import plm_engine
    from pema_ray.plm_owner.service.replicas import Replicas
    from pema_ray.runtime.serving.scale import Scale

    plm = PLMConfig(name=tiny_model(scratch / "tiny"), device="cpu", dtype="float32", threads=1)
    engine = PLMEngine(plm.model_dump(), {"slots": 4, "max_tokens": 512})
    fingerprint = (await engine.describe()).card.fingerprint
    within = await _one_by_one(Line(engine, fingerprint), count)
    await engine.plm.end()

    class Probe:
        def __init__(self, handle: Any) -> None:
            self._line = Replicas(handle)

        async def measure(self, count: int) -> list[float]:
            return await _one_by_one(self._line, count)

    ray.init(num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        replicas = plm_engine(plm, EngineConfig(slots=4, max_tokens=512), Scale(cpus=0.5))
        probe: Any = serve.deployment(Probe)
        handle = serve.run(probe.bind(replicas), name="line", route_prefix=None)
        across = await handle.measure.remote(count)
    finally:
        serve.shutdown()
        ray.shutdown()
    return {
        f"{place}, {quantile}": 1e3 * sorted(seconds)[int(share * (len(seconds) - 1))]
        for place, seconds in (("in one process", within), ("in a cluster", across))
        for quantile, share in (("median", 0.5), ("99th percentile", 0.99))
    }


if __name__ == "__main__":
    main()
