"""`mt-datastore`: the decoder keys of every training target position as an external memory, and its index.

A pair is an example of `pema_ray.memory`: the source is its prompt, the target its target, `<eos>` its last row.
Shards, receipts, manifest, number formats and resuming are the memory's own; the fingerprint is the translator's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema_ray.line import ExtractBatch, ModelCard
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.search.index import IndexBuild, build_index, load_parts
from pema_ray.memory.search.nearest import RECALL_QUERIES, OnePieceSearch, SearchOptions, recall
from pema_ray.memory.specification import MemoryBuild
from pema_ray.runtime.progress import track
from pema_ray.tasks import EncodedPair
from pema_ray.trime.config import DatastoreConfig
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.stages.datastore import build_on_ray
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.data import Parallel, load_subwords, padded
from pema_ray.trime.translation.model import Translator, load_translator, read_fingerprint
from pema_ray.trime.translation.run import MtRun


class DecoderKeys:
    """A translator as the extractor that a memory is built with.

    A sequence is a source, `<eos>` (the `first` position with a row), and a target.
    """

    def __init__(self, model: Translator, device: torch.device | str = "cpu") -> None:
        self._model, self._device = model, device

    @torch.inference_mode()
    def extract(self, batch: ExtractBatch) -> Tensor:
        """`[N, H]` float32: the keys that predict each target's tokens and its end, target after target."""
        m = self._model
        parts = list(zip(batch.token_ids, batch.first, strict=True))
        source_BS = padded([ids[: first + 1] for ids, first in parts], m.pad)
        input_BT = padded([[m.start, *ids[first + 1 :]] for ids, first in parts], m.pad)
        source, inputs = (torch.from_numpy(array).to(self._device) for array in (source_BS, input_BT))
        key_BTH = m.represent(source, inputs).key_BTH.float().cpu()
        return torch.cat([key_TH[: len(ids) - first] for key_TH, (ids, first) in zip(key_BTH, parts)])


def key_maker(folder: Path, device: torch.device) -> Callable[[ExtractBatch], Tensor]:
    """The keys of the translator in a folder."""
    return DecoderKeys(load_translator(folder).to(device), device).extract


def run(config: MtConfig) -> dict[str, Any]:
    """Write `datastore/` and `index/`."""
    run = MtRun(config)
    run.perform("datastore", lambda: _build(run))
    return run.perform("index", lambda: _index(run))


def card_of(run: MtRun, model: Translator | None = None) -> ModelCard:
    """The card of a translator in a datastore."""
    folder = run.path("train", "model")
    model = model or load_translator(folder)
    eos = load_subwords(run.path("prepare"), run.config.model.name).eos
    positions = 2 * run.config.data.max_tokens  # a source and a target
    sizes = (model.hidden_size, model.vocabulary_size, positions)
    return ModelCard(run.folder.name, read_fingerprint(folder), *sizes, (eos,))


def plan_datastore(folder: Path, pairs: Parallel, card: ModelCard, corpus: str, config: DatastoreConfig) -> MemoryBuild:
    """The build of the training split's datastore."""
    eos = card.eos_token_ids[0]
    examples = [
        EncodedPair(number, [*source, eos], target)
        for number, (source, target) in enumerate(zip(pairs.source, pairs.target))
    ]
    settings = BuildMemoryConfig(
        actors=config.actors,
        cpus_per_actor=config.cpus_per_actor,
        gpus_per_actor=config.gpus_per_actor,
        examples_per_shard=max(1, config.rows_per_shard // max(1, pairs.length + 1)),
        max_batch_tokens=config.max_batch_tokens,
        key_dtype=config.key_dtype,
    )
    return MemoryBuild(folder, ListedExamples(examples), card, corpus, "train", settings)


def _build(run: MtRun) -> dict[str, Any]:
    c = run.config.datastore
    pairs = Parallel.load(run.path("prepare"), "train")
    build = plan_datastore(run.path("datastore"), pairs, card_of(run), run.folder.name, c)
    return build_on_ray(build, key_maker, run.path("train", "model"), c, run.config.ray)[0]


def _index(run: MtRun) -> dict[str, Any]:
    c, model = run.config.index, load_translator(run.path("train", "model"))
    store = open_datastore(run.path("datastore"), card_of(run, model))
    build = IndexBuild(run.path("index"), store, c, run.config.seed)
    build.prepare()
    with track("index", len(build.missing), "parts") as bar:
        info = build_index(build, lambda number: bar.advance(1))
    metrics: dict[str, Any] = {"rows": info.rows, "bytes": info.bytes, "parts": len(build.parts), "lists": info.lists}
    if info.kind == "exact":
        return {**metrics, "summary": f"exact search over {info.rows:,} keys"}
    g, queries = run.config.generate, dev_keys(run, model, RECALL_QUERIES)
    k = min(c.recall_at, len(store))

    def search(index: Path | None):
        options = SearchOptions(c.metric, g.probes, g.rescore, g.oversample)
        return OnePieceSearch(load_parts(store, index, options)).search(queries, k)

    share = round(recall(search(run.path("index")), search(None)), 4)
    return {**metrics, "recall": share, "summary": f"{info.kind} over {info.rows:,} keys; recall@{k} {share:.3f}"}


def dev_keys(run: MtRun, model: Translator, count: int) -> np.ndarray:
    """`[count, H]`: keys of the dev split's first target tokens, the queries that recall is measured with."""
    dev = Parallel.load(run.path("prepare"), "dev").first(count)
    eos = load_subwords(run.path("prepare"), run.config.model.name).eos
    source = DecoderKeys(model)
    keys = [
        source.extract(ExtractBatch([[*s, eos, *t]], [len(s)])) for s, t in zip(dev.source, dev.target)
    ]  # one by one: a few hundred rows
    return torch.cat(keys)[:count].numpy()
