"""`pema-ray trime evaluate`: every system calibrated on dev and scored on test, in one table.

The model passes once over each split for every datastore; all settings are chosen from what the pass measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.errors import UserError
from pema_ray.line import ModelCard
from pema_ray.memory.search.nearest import Neighbours, SearchOptions
from pema_ray.memory.search.ray_search import open_search
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.hardware import pick_device
from pema_ray.runtime.progress import console, track
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.evaluation.calibration import calibrate, nll
from pema_ray.trime.evaluation.curves import curves_of
from pema_ray.trime.evaluation.results import Chosen, Pass, SystemScores, TrimeEvaluation, markdown
from pema_ray.trime.evaluation.statistics import Probe, Statistics, Text, Vectors, measure
from pema_ray.trime.evaluation.systems import EvaluationSystem, make_probe, make_system, names_of, needs_datastore
from pema_ray.trime.model.registry import TrainableLM, load_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.datastore import card_of, with_eos
from pema_ray.trime.text.segments import TokenStream

OWN = "own"


@dataclass(frozen=True, slots=True)
class Store:
    """A datastore to search, and its index if it has one."""

    name: str
    folder: Path
    index: Path | None


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `evaluate/evaluation.json` and `evaluate/table.md`."""
    run = TrimeRun(config)
    return run.perform("evaluate", lambda: _evaluate(run))


def _evaluate(run: TrimeRun) -> dict[str, Any]:
    c = run.config
    device = pick_device(c.evaluate.device)
    model = load_model(run.model_folder).to(device)
    texts = {split: text_of(run, split, device) for split in ("dev", "test")}
    card = card_of(run.model_folder, TokenStream.open(run.path("prepare"), "dev").eos_id, model)
    systems = [make_system(name, c.evaluate) for name in names_of(c)]
    scores, curves, passes = [], [], []
    cluster = ray_cluster(c.ray, 1) if c.evaluate.search_actors and needs_datastore(c) else nullcontext()
    with cluster:
        for vectors, group in _by_vectors(systems):
            probe = make_probe(c, vectors, model.hidden_size)
            external = [system for system in group if system.mixture.external]
            stores: list[Store | None] = list(stores_of(run)) if external else [None]
            for number, store in enumerate(stores):
                dev, test, speed = _measure(run, model, card, texts, probe, store)
                passes.append(speed)
                for system in group if number == 0 else external:
                    scores.append(_scores(system, store, probe, dev, test))
                curves += curves_of(dev, probe, group, store.name if store else None) if number == 0 else []
    order = [system.name for system in systems]
    scores.sort(key=lambda row: order.index(row.system))
    evaluation = TrimeEvaluation(
        model=card.name,
        fingerprint=card.fingerprint,
        memory=c.train.memory,
        updates=c.train.updates if c.evaluate.model is None else None,
        tokens={split: len(text.token_N) - 1 for split, text in texts.items()},
        per_character=c.prepare.vocabulary in ("character", "byte"),
        scores=tuple(scores),
        curves=tuple(curves),
        passes=tuple(passes),
    )
    evaluation.save(run.path("evaluate"))
    console.print(markdown(evaluation), markup=False, highlight=False)
    best = min(scores, key=lambda row: row.test_nll)
    names = [f"{row.system} {row.datastore}" if row.datastore else row.system for row in scores]
    return {
        "test_perplexity": {name: round(row.test_perplexity, 3) for name, row in zip(names, scores)},
        "tokens_per_second": {speed.name: round(speed.tokens_per_second, 1) for speed in passes},
        "summary": f"{len(scores)} systems, best {best.label}: test perplexity {best.test_perplexity:.2f}",
    }


def text_of(run: TrimeRun, split: str, device: torch.device) -> Text:
    """A split after an `<eos>`, so that each of its tokens is scored."""
    stream = TokenStream.open(run.path("prepare"), split)
    limit = run.config.evaluate.max_tokens.get(split)  # type: ignore[call-overload]
    token_N = with_eos(stream)[: None if limit is None else limit + 1]
    document_N = np.searchsorted(stream.start_D, np.maximum(np.arange(len(token_N)) - 1, 0), side="right") - 1
    return Text(torch.from_numpy(token_N).to(device), torch.from_numpy(document_N).to(device))


def stores_of(run: TrimeRun) -> Iterator[Store]:
    """The run's own datastore, and those the configuration names."""
    yield Store(OWN, run.path("datastore"), run.path("index"))
    for name, folder in run.config.evaluate.datastores.items():
        if name == OWN:
            raise UserError(f"evaluate.datastores: '{OWN}' is the run's own; choose another name.")
        index = Path(folder).parent / "index"
        yield Store(name, Path(folder), index if (index / "index.json").exists() else None)


def _by_vectors(systems: Sequence[EvaluationSystem]) -> Iterator[tuple[Vectors, list[EvaluationSystem]]]:
    """Systems that share a pass: those that compare the same vectors; those that compare none join the first."""
    kinds: list[Vectors] = list(dict.fromkeys(s.vectors for s in systems if s.vectors is not None)) or ["key"]
    for number, vectors in enumerate(kinds):
        yield vectors, [s for s in systems if s.vectors == vectors or (s.vectors is None and number == 0)]


def _measure(
    run: TrimeRun, model: TrainableLM, card: ModelCard, texts: dict[str, Text], probe: Probe, store: Store | None
) -> tuple[Statistics, Statistics, Pass]:
    c = run.config.evaluate
    name = f"{probe.vectors} memory" + (f", datastore {store.name}" if store else "")
    tokens = sum(len(text.token_N) - 1 for text in texts.values())
    with ExitStack() as stack:
        search: Neighbours | None = None
        if store is not None:
            options = SearchOptions(run.config.index.metric, c.probes, c.rescore, c.oversample)
            memory = open_datastore(store.folder, card)
            search = stack.enter_context(open_search(memory, store.index, options, c.search_actors))
        bar = stack.enter_context(track(name, tokens, "tokens"))
        started = time.perf_counter()
        dev, test = (measure(model, texts[s], probe, search, lambda n: bar.advance(n)) for s in ("dev", "test"))
    return dev, test, Pass(name=name, tokens=tokens, seconds=time.perf_counter() - started)


def _scores(
    system: EvaluationSystem, store: Store | None, probe: Probe, dev: Statistics, test: Statistics
) -> SystemScores:
    """Calibrate on dev, and score both splits."""
    mixture, calibrated = system.mixture, calibrate(dev, probe, system.mixture)
    settings = calibrated.settings
    return SystemScores(
        system=system.name,
        label=system.label,
        datastore=store.name if store and mixture.external else None,
        chosen=Chosen(
            tau=settings.tau if mixture.rule != "none" else None,
            weight=settings.weight if mixture.rule == "li" else None,
            interp_temp=settings.interp_temp if mixture.second else None,
            second_weight=settings.second_weight if mixture.second else None,
        ),
        dev_nll=calibrated.nll,
        test_nll=nll(test, probe, mixture, settings),
    )
