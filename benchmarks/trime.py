"""TRIME: a training step beside the published formulation and beside cross-entropy, evaluation, and retrieval.

The published formulation computes all logits of vocabulary and memory, hides memory entries by adding -10000 · an N × N
float mask, and finds positives by another such mask. Keys of the retrieval part are a model's own and noisy copies of
them: what is measured is time at a given recall, not perplexity.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Aim, PeakMemory, clock, console, device_of, options, reporting_to, run_worker, show, write_results
from torch import Tensor

from pema_ray.memory import ExternalMemory, Manifest, ShardInfo
from pema_ray.memory.codec import encode
from pema_ray.memory.search.config import IndexConfig
from pema_ray.memory.search.index import IndexBuild, build_index, load_parts
from pema_ray.memory.search.nearest import OnePieceSearch, SearchOptions, recall
from pema_ray.memory.shards import MemoryRows, write_shard
from pema_ray.trime.config import DecoderShape, TrimeEvaluateConfig
from pema_ray.trime.evaluation.statistics import Probe, Text, measure
from pema_ray.trime.model.decoder import DecoderLM
from pema_ray.trime.objective.objective import MemoryMode, TrimeObjective
from pema_ray.trime.text.windows import plan_windows

NAME = "trime"
AIMS = {
    "step_local_vs_published": Aim(1.5),
    "step_long_vs_published": Aim(1.5),
    "memory_local_vs_published": Aim(0.5, at_most=True),
    "memory_long_vs_published": Aim(0.5, at_most=True),
    "step_local_over_ce": Aim(1.1, at_most=True),
    "step_long_over_ce": Aim(1.4, at_most=True),
    "evaluation_vs_brute_force": Aim(2.0),
    "index_vs_exact_at_recall_95": Aim(1.0),
    "knn_evaluation_slowdown": Aim(1.5, at_most=True),
}
SIZES = {
    "layers": 4, "hidden": 256, "vocabulary": 16_384, "segments": 8, "length": 512, "keys": 400_000, "k": 256,
    "oversample": 4,
}  # fmt: skip
SMOKE = {
    "layers": 1, "hidden": 16, "vocabulary": 64, "segments": 2, "length": 16, "keys": 3000, "k": 8, "oversample": 16
}  # fmt: skip
HIDDEN = -10_000.0
RECALL = 0.95
INDEX = IndexConfig(kind="ivf_pq_fast", train_rows=100_000)
TAUS = TrimeEvaluateConfig().taus
SHARES = (0, 1, 2, 3, 4)  # long memories, in segments


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--worker", choices=["ours", "published"], help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=["local", "long"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    o = parser.parse_args()
    device, size = device_of(o), SMOKE if o.smoke else SIZES
    if o.worker:
        with reporting_to(o.out) as report:
            step = _step(o.worker, o.memory, size, device)
            peak = PeakMemory(device)
            step()
            report["peak_bytes"] = peak.taken()
        return
    repeats = 1 if o.smoke else o.repeats
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {"sizes": size, "threads": o.threads, "smoke": o.smoke}
    sides = [("ours", "none"), *((side, memory) for memory in ("local", "long") for side in ("ours", "published"))]
    seconds = _in_turns(
        {f"{side} {memory}": _step(side, memory, size, device) for side, memory in sides}, device, repeats
    )
    peaks = {f"{side} {memory}": _peak(o, side, memory) for side, memory in sides if memory != "none"}
    for memory in ("local", "long"):
        ratios[f"step_{memory}_vs_published"] = seconds[f"published {memory}"] / seconds[f"ours {memory}"]
        ratios[f"memory_{memory}_vs_published"] = peaks[f"ours {memory}"] / peaks[f"published {memory}"]
        ratios[f"step_{memory}_over_ce"] = seconds[f"ours {memory}"] / seconds["ours none"]
    figures |= {"step_seconds": seconds, "step_peak_bytes": peaks}
    with tempfile.TemporaryDirectory(prefix="tr") as folder:
        retrieval_ratios, retrieval_figures = _retrieval(Path(folder), size, device, repeats)
    ratios |= retrieval_ratios
    figures |= retrieval_figures
    figures["notes"] = [
        "A step: forward and backward of one batch, without the optimiser. Peak memory: of a process of its own.",
        f"kNN: {size['keys']:,} keys of {size['hidden']}, k = {size['k']}; index {INDEX.kind}, "
        f"{size['oversample']} candidates rescored for each neighbour, probes raised until recall reaches .95.",
        f"Evaluation: one memory size and temperature on either side. All settings: {len(SHARES)} sizes "
        f"({', '.join(str(share * size['length']) for share in SHARES)}) × {len(TAUS)} temperatures at once.",
    ]
    path = write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("TRIME", ratios, AIMS, figures["notes"])
    console.print(f"written: {path}")


def _in_turns(work: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each, measured in turns after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            started = clock(device)
            function()
            if turn:
                seconds[name].append(clock(device) - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


# ── a training step ─────────────────────────────────────────────────────────


def _model(size: dict[str, int], device: torch.device) -> DecoderLM:
    torch.manual_seed(0)
    H = size["hidden"]
    shape = DecoderShape(layers=size["layers"], hidden_size=H, ffn_size=4 * H, heads=4, dropout=0.0)
    return DecoderLM(shape, size["vocabulary"], size["length"]).to(device)


def _tokens(size: dict[str, int], count: int, device: torch.device, seed: int = 1) -> Tensor:
    """Tokens whose frequencies fall as words' do."""
    drawn = np.random.default_rng(seed).zipf(1.2, count) % size["vocabulary"]
    return torch.from_numpy(drawn.astype(np.int64)).to(device)


def _step(side: str, memory: str, size: dict[str, int], device: torch.device) -> Callable[[], object]:
    """Forward and backward of one batch."""
    model = _model(size, device)
    B, L = size["segments"], size["length"]
    token = _tokens(size, B * L + 1, device)
    input_BL, label_BL = token[:-1].view(B, L), token[1:].view(B, L)
    segment_BL = torch.arange(B, device=device)[:, None].expand(B, L).contiguous()
    objective = TrimeObjective(model)

    def ours() -> None:
        model.zero_grad()
        mode = MemoryMode(memory, across_documents=True)  # type: ignore[arg-type]
        loss, _ = objective(input_BL, label_BL, torch.zeros_like(input_BL), segment_BL, mode, float(B * L))
        loss.backward()

    def published() -> None:
        model.zero_grad()
        state_BLH, key_BLH = model.represent(input_BL)
        H = state_BLH.shape[-1]
        label_N, segment_N = label_BL.flatten(), segment_BL.flatten()
        vocabulary_NV = state_BLH.view(-1, H) @ model.embedding.weight.T  # type: ignore[operator, union-attr]
        key_NH = key_BLH.view(-1, H)
        memory_NN = key_NH @ key_NH.T / math.sqrt(H)
        place = torch.arange(B * L, device=device)
        hidden = place[None] >= place[:, None]
        if memory == "local":
            hidden |= segment_N[None] != segment_N[:, None]
        memory_NN = memory_NN + hidden.float() * HIDDEN
        other_NN = (label_N[None] != label_N[:, None]).float() * HIDDEN
        whole_N = torch.cat([vocabulary_NV, memory_NN], 1).logsumexp(1)
        target_N = vocabulary_NV.gather(1, label_N[:, None])
        positive_N = torch.cat([target_N, memory_NN + other_NN], 1).logsumexp(1)
        (whole_N - positive_N).mean().backward()

    return ours if side == "ours" else published


def _peak(o: argparse.Namespace, side: str, memory: str) -> int:
    common = [f"--threads={o.threads}", *(["--gpu"] if o.gpu else []), *(["--smoke"] if o.smoke else [])]
    return run_worker(__file__, [f"--worker={side}", f"--memory={memory}", *common])["peak_bytes"]


# ── evaluation and retrieval ────────────────────────────────────────────────


def _retrieval(
    folder: Path, size: dict[str, int], device: torch.device, repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    model, length, k = _model(size, device).eval(), size["length"], size["k"]
    probe = Probe(length, length // 2, batch_windows=8, sizes=(0, 4 * length), neighbours=(k,))
    grid = replace(probe, sizes=tuple(share * length for share in SHARES), taus=TAUS)
    text = Text(_tokens(size, 8 * length, device, 2))
    brute = _in_turns(
        {
            "ours": lambda: measure(model, text, probe),
            "all settings": lambda: measure(model, text, grid),
            "brute force": lambda: _brute_force(model, text, probe),
        },
        device,
        repeats,
    )
    store = _datastore(folder / "store", model, size, device)
    query_NH = _keys(model, _tokens(size, 2 * length, device, 3))
    build_index(IndexBuild(folder / "index", store, INDEX, 0))
    exact = OnePieceSearch(load_parts(store, None, SearchOptions()))
    truth, probes, reached = exact.search(query_NH, k), 1, 0.0
    while True:
        options = SearchOptions(probes=probes, oversample=size["oversample"])
        index = OnePieceSearch(load_parts(store, folder / "index", options))
        reached = recall(index.search(query_NH, k), truth)
        if reached >= RECALL or probes > len(store):
            break
        probes *= 2
    if reached < RECALL:
        console.print(f"[red]recall {reached:.3f} at most, not {RECALL}: retrieval has no ratios[/]")
    search = _in_turns(
        {"exact": lambda: exact.search(query_NH, k), "index": lambda: index.search(query_NH, k)}, device, repeats
    )
    evaluation = _in_turns(
        {"plain": lambda: measure(model, text, probe), "kNN": lambda: measure(model, text, probe, index)},
        device,
        repeats,
    )
    tokens = len(text.token_N) - 1
    ratios = {
        "evaluation_vs_brute_force": brute["brute force"] / brute["ours"],
        "all_settings_over_one": brute["all settings"] / brute["ours"],
        "index_vs_exact_at_recall_95": search["exact"] / search["index"] if reached >= RECALL else math.nan,
        "knn_evaluation_slowdown": evaluation["kNN"] / evaluation["plain"] if reached >= RECALL else math.nan,
    }
    figures = {
        "recall": reached,
        "probes": probes,
        "search_seconds": search,
        "queries": len(query_NH),
        "tokens_per_second": {
            **{name: tokens / seconds for name, seconds in evaluation.items()},
            "all settings": tokens / brute["all settings"],
            "brute force": tokens / brute["brute force"],
        },
    }
    return ratios, figures


@torch.inference_mode()
def _brute_force(model: DecoderLM, text: Text, probe: Probe) -> float:
    """Window by window, all logits, the memory masked by -10000, long memory rebuilt for every window."""
    H, total, history = model.hidden_size, 0.0, []
    for window in plan_windows(len(text.token_N), probe.tokens_per_sample, probe.context_window):
        state, key = model.represent(text.token_N[None, window.start : window.end])
        new = slice(window.first - window.start, window.length)
        long = torch.cat([key[0, :0], *history])[: window.start][-probe.sizes[-1] :]
        memory_MH = torch.cat([long, key[0]])
        entry_M = torch.cat([torch.arange(window.start - len(long), window.start),
                             torch.arange(window.start, window.end)]).to(key.device) + 1  # fmt: skip
        place_N = torch.arange(window.first, window.end, device=key.device) + 1
        target_N = text.token_N[place_N]
        memory_NM = key[0, new] @ memory_MH.T / math.sqrt(H) + (entry_M[None] >= place_N[:, None]).float() * HIDDEN
        log_p_NV, normaliser_N = model.log_probs(state[0, new])
        vocabulary_NV = log_p_NV + normaliser_N[:, None]
        other_NM = (text.token_N[entry_M][None] != target_N[:, None]).float() * HIDDEN
        whole_N = torch.cat([vocabulary_NV, memory_NM], 1).logsumexp(1)
        hit_N = torch.cat([vocabulary_NV.gather(1, target_N[:, None]), memory_NM + other_NM], 1).logsumexp(1)
        total += float((whole_N - hit_N).sum())
        history.append(key[0, new])
    return total


@torch.inference_mode()
def _keys(model: DecoderLM, token_N: Tensor) -> np.ndarray:
    length = model.max_positions
    whole_BT = token_N[: len(token_N) // length * length].view(-1, length)
    return model.represent(whole_BT).key_BTH.flatten(0, 1).cpu().numpy()


def _datastore(folder: Path, model: DecoderLM, size: dict[str, int], device: torch.device) -> ExternalMemory:
    """`keys` rows: those of some text, and noisy copies."""
    rng, count, H = np.random.default_rng(4), size["keys"], size["hidden"]
    own_NH = _keys(model, _tokens(size, min(count, 32 * size["length"]), device, 5))
    folder.mkdir()
    infos = []
    for number, rows in enumerate(np.array_split(np.arange(count), 8)):
        picked_NH = own_NH[rng.integers(0, len(own_NH), len(rows))]
        keys = encode(picked_NH + 0.3 * picked_NH.std() * rng.standard_normal((len(rows), H), np.float32), "float16")
        name, n = f"shard-{number:05d}.parquet", len(rows)
        target = rng.integers(0, size["vocabulary"], n).astype(np.int32)
        written, digest = write_shard(folder / name, MemoryRows(keys, target, rows, np.zeros(n, np.int32)))
        infos.append(ShardInfo(name=name, rows=n, examples=n, tokens=n, padded_tokens=n, bytes=written, sha256=digest))
    Manifest(
        plm_name="benchmark", fingerprint="0" * 16, hidden_size=H, vocab_size=size["vocabulary"], eos_token_id=0,
        task="benchmark", split="train", context="teacher_forced", key_dtype="float16", plan_hash="0" * 16, rows=count,
        examples=count, shards=tuple(infos),
    ).save(folder)  # fmt: skip
    return ExternalMemory.open(folder)


if __name__ == "__main__":
    main()
