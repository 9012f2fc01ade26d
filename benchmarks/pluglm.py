"""PlugLM: what exact search costs, what the memory layer costs, what a training step and a refresh cost.

- **search**: top 5 of a memory of 128 numbers a key, in float16, for a batch of 64 queries, by `pluglm.search` (torch),
  beside faiss's exact indices (`IndexFlatIP` over float32 copies; float16 codes).
- **inference**: a forward pass of an encoder with one memory layer, its memory searched, beside the plain encoder of
  equal size (same layers, and a feed-forward network where the memory layer has none).
- **published**: a training step and a refresh beside the published design, in which every process holds the whole
  memory and reads each refresh from the leading process's files: here one process encodes all documents and writes
  keys and values, and `ranks` copies of them are read and held.

All sides of a ratio are measured in one run, in turns; medians are compared.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import Aim, console, device_of, options, show, write_results

from pema_ray.pluglm.memory.search import KeyTable, RetrievedEntries
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.knowledge import LocalKnowledge

NAME = "pluglm"
AIMS = {"search_over_faiss_float32": Aim(1.0, at_most=True), "inference_over_plain_encoder": Aim(1.5, at_most=True)}


def main() -> None:
    o = _options()
    device_of(o)
    torch.manual_seed(0)
    ratios, figures = {}, {"threads": o.threads, "entries": o.entries, "queries": o.queries}
    for part in (_search, _inference, _published):
        part_ratios, part_figures = part(o)
        ratios |= part_ratios
        figures |= part_figures
    show("PlugLM", ratios, AIMS, [f"{name}: {value}" for name, value in figures.items()])
    figures |= {"smoke": o.smoke}
    console.print(f"written: {write_results(NAME, ratios, AIMS, figures, o.results_dir)}")


def _options() -> argparse.Namespace:
    parser = options("Exact search, memory layer, training step and refresh of PlugLM.")
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the searched memory")
    parser.add_argument("--queries", type=int, default=64, help="of a batch")
    parser.add_argument("--documents", type=int, default=20_000, help="of the memory that is encoded anew")
    parser.add_argument("--sequences", type=int, default=32, help="of a training step, of 128 tokens")
    parser.add_argument("--ranks", type=int, default=2, help="processes that hold the memory in the published design")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of every side")
    o = parser.parse_args()
    if o.smoke:
        o.entries, o.documents, o.repeats, o.queries, o.sequences = 20_000, 300, 2, 4, 2
    return o


def _in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(median(values), 5) for name, values in seconds.items()}


# ── search ──────────────────────────────────────────────────────────────────


def _search(o: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    key_NQ, query_BQ = torch.randn(o.entries, 128).half(), torch.randn(o.queries, 128)
    table = KeyTable(key_NQ, torch.arange(o.entries), torch.zeros(o.entries, dtype=torch.int64))
    sides: dict[str, Callable[[], Any]] = {"torch": lambda: table.top(query_BQ, 5)}
    try:
        import faiss
    except ImportError:
        console.print("faiss is not installed: search is measured alone.")
    else:
        faiss.omp_set_num_threads(o.threads)
        flat, half = (faiss.IndexFlatIP(128), _faiss_half(faiss))
        for index in (flat, half):
            index.add(key_NQ.float().numpy())
        query = query_BQ.numpy()
        sides |= {"faiss_float32": lambda: flat.search(query, 5), "faiss_float16": lambda: half.search(query, 5)}
        same = np.sort(flat.search(query, 5)[1]) == np.sort(table.top(query_BQ, 5).entry_BK.numpy())
        console.print(f"faiss finds {same.mean():.1%} of the entries that exact search finds.")
    seconds = _in_turns(sides, o.repeats)
    ratios = {f"search_over_{name}": seconds["torch"] / value for name, value in seconds.items() if name != "torch"}
    return ratios, {f"search_{name}_seconds": value for name, value in seconds.items()}


def _faiss_half(faiss: Any) -> Any:
    return faiss.IndexScalarQuantizer(128, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


# ── inference ───────────────────────────────────────────────────────────────

_SIZES = {
    "model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 1024, "vocab_size": 30_522, "max_position_embeddings": 512,
}  # fmt: skip


def _model(width: int) -> PlugLMForMaskedLM:
    return PlugLMForMaskedLM(PlugLMConfig(backbone=_SIZES, memory_feed_forward=width)).eval()


def _memory(model: PlugLMForMaskedLM, entries: int, tokens: int = 64) -> LocalKnowledge:
    """Random keys, values and documents."""
    Q, D = model.config.query_size, model.config.hidden_size
    ids = torch.arange(entries)
    return LocalKnowledge(
        "random", 1, model.fingerprint(), ids, ids + 1, torch.randn(entries, Q).half(), torch.randn(entries, D).half(),
        torch.randint(5, 30_000, (entries * tokens,), dtype=torch.int32), (ids + 1) * tokens,
    )  # fmt: skip


@torch.no_grad()
def _inference(o: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    plain, small, large = _model(_SIZES["intermediate_size"]), _model(0), _model(0)
    plain.attach(None)
    small.attach(_memory(small, min(o.entries, 20_000), 8))
    large.attach(_memory(large, o.entries, 8))
    tokens = torch.randint(5, 30_000, (o.queries, 128))
    sides = {
        name: (lambda model=model: model.model(tokens))
        for name, model in (("plain", plain), ("memory_20k", small), ("memory_large", large))
    }
    seconds = _in_turns(sides, o.repeats)
    ratios = {
        "inference_over_plain_encoder": seconds["memory_20k"] / seconds["plain"],
        "inference_large_over_plain_encoder": seconds["memory_large"] / seconds["plain"],
    }
    return ratios, {f"inference_{name}_seconds": value for name, value in seconds.items()}


# ── the published design ────────────────────────────────────────────────────


def _published(o: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    model = _model(256)
    memory = _memory(model, o.documents)
    tokens = torch.randint(5, 30_000, (o.sequences, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model.train()
        model.attach(memory, allow_stale=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def published_step() -> None:
        """The same with the published search: all scores, one top-k, over float32 keys as every process holds them."""
        model.train()
        model.attach(dense, allow_stale=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    dense = _PublishedSearch(**{**vars(memory), "key_NQ": memory.key_NQ.float()})
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "step": step,
            "step_published": published_step,
            "refresh": lambda: _refresh(model, memory, Path(folder), ranks=0),
            "refresh_published": lambda: _refresh(model, memory, Path(folder), o.ranks),
        }
        seconds = _in_turns(sides, max(2, o.repeats // 2))
    memory_bytes = sum(t.element_size() * t.numel() for t in (memory.key_NQ, memory.value_ND, memory.token))
    ratios = {
        "step_over_published": seconds["step"] / seconds["step_published"],
        "refresh_over_published": seconds["refresh"] / seconds["refresh_published"],
        "memory_held_over_published": 1 / o.ranks,
    }
    return ratios, {f"{name}_seconds": value for name, value in seconds.items()} | {"memory_bytes": memory_bytes}


class _PublishedSearch(LocalKnowledge):
    """The published search: over the whole memory at once."""

    def search(
        self, query_BQ: torch.Tensor, k: int, own_B: torch.Tensor | None = None, cosine: bool = False
    ) -> RetrievedEntries:
        score, entry = torch.topk(query_BQ @ self.key_NQ.T, k)
        return RetrievedEntries(entry, score)


@torch.no_grad()
def _refresh(model: PlugLMForMaskedLM, memory: LocalKnowledge, folder: Path, ranks: int) -> None:
    """Encode all documents; published: keep keys and values as arrays, and read them whole in every process."""
    from safetensors.torch import save_file

    model.eval()
    keys, values = [], []
    for start in range(0, len(memory), 64):
        token_ML, mask_ML = memory.tokens(memory.entry_N[start : start + 64])
        key_MQ, value_MD = model.model.encode_documents(token_ML, mask_ML)
        keys.append(key_MQ.half())
        values.append(value_MD.half())
    key_NQ, value_ND = torch.cat(keys), torch.cat(values)
    if not ranks:
        save_file({"key": key_NQ, "value": value_ND}, folder / "vectors.safetensors")
        return
    for name, tensor in (("key", key_NQ), ("value", value_ND)):
        np.save(folder / f"{name}.npy", tensor.numpy())
    for _ in range(ranks):
        held_anew = [np.load(folder / f"{name}.npy") for name in ("key", "value")]
        held_anew[0] = held_anew[0].astype(np.float32)


if __name__ == "__main__":
    main()
