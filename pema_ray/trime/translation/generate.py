"""`mt-generate`: translate the test split with every system of the run, and score it by sacreBLEU."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from pema_ray.errors import UserError
from pema_ray.evaluation.scores import Scorer
from pema_ray.memory.search.nearest import Neighbours, SearchOptions
from pema_ray.memory.search.ray_search import open_search
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.hardware import pick_device
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.translation.calibrate import calibrate, nll, score_targets
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.data import Parallel, load_subwords
from pema_ray.trime.translation.datastore import card_of
from pema_ray.trime.translation.decode import Mixing, TranslationDecoder
from pema_ray.trime.translation.model import Translator, load_translator
from pema_ray.trime.translation.run import MtRun

_GRID = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def run(config: MtConfig) -> dict[str, Any]:
    """Write `generate/<system>.txt` and `generate/metrics.json`."""
    run = MtRun(config)
    return run.perform("generate", lambda: _generate(run))


def _generate(run: MtRun) -> dict[str, Any]:
    c, g = run.config, run.config.generate
    model = load_translator(run.path("train", "model")).to(pick_device(g.device))
    subwords = load_subwords(run.path("prepare"), c.model.name)
    test = Parallel.load(run.path("prepare"), "test")
    scorer = Scorer(test.reference, c.data.target_language)
    systems: dict[str, Any] = {}

    def translate(mixing: Mixing, search: Neighbours | None, more: dict[str, Any]) -> None:
        started = time.perf_counter()
        answers = TranslationDecoder(model, subwords.eos, mixing, search).translate(test.source, g)
        texts = [subwords.text(ids) for ids in answers]
        with atomic_file(run.path("generate", f"{mixing.system}.txt")) as temporary:
            temporary.write_text("".join(f"{' '.join(text.split())}\n" for text in texts), encoding="utf-8")
        scores = scorer.score(texts)
        seconds = time.perf_counter() - started
        quality = {"bleu": round(scores.bleu, 2), "chrf": round(scores.chrf, 2)}
        speed = {"seconds": round(seconds, 2), "tokens_per_second": round(sum(map(len, answers)) / seconds, 1)}
        systems[mixing.system] = {**quality, **speed, **more}

    if "plain" in c.systems:
        translate(Mixing("plain"), None, {})
    mixed = [name for name in c.systems if name != "plain"]
    if mixed:
        store = open_datastore(run.path("datastore"), card_of(run, model))
        if g.neighbours > len(store):
            raise UserError(
                f"generate.neighbours={g.neighbours:,}: the datastore has {len(store):,} entries. Lower it to that."
            )
        options = SearchOptions(c.index.metric, g.probes, g.rescore, g.oversample)
        cluster = ray_cluster(c.ray, 1, workers=g.search_actors) if g.search_actors else nullcontext()
        with cluster, open_search(store, run.path("index"), options, g.search_actors) as search:
            for name in mixed:
                mixing, more = _calibrated(run, name, model, subwords.eos, search)
                translate(mixing, search, more)
    bleu = ", ".join(f"{name} {figures['bleu']:.2f}" for name, figures in systems.items())
    signature, _ = scorer.signatures
    settings = {"beam": g.beam, "length_penalty": g.length_penalty, "pairs": len(test), "signature": signature}
    return {**settings, "systems": systems, "summary": f"{len(test):,} test pairs; sacreBLEU {bleu} ({signature})"}


def _calibrated(
    run: MtRun, system: Any, model: Translator, eos: int, search: Neighbours
) -> tuple[Mixing, dict[str, Any]]:
    """The mixing with the best dev likelihood, and its figures for the metrics."""
    g = run.config.generate
    dev = Parallel.load(run.path("prepare"), "dev").first(g.calibration_pairs)
    scores = score_targets(model, eos, dev, search, g.neighbours)
    mixing = calibrate(scores, Mixing(system, g.neighbours), _temperatures(run, system, model.hidden_size), g.weights)
    settings = {k: v for k, v in asdict(mixing).items() if k != "system"}
    plain_nll = -float(scores.log_prob_N.double().mean())
    return mixing, {**settings, "plain_dev_nll": round(plain_nll, 4), "dev_nll": round(nll(scores, mixing), 4)}


def _temperatures(run: MtRun, system: str, hidden: int) -> tuple[float, ...]:
    """A grid: around the training's temperature for `trime`; for `knn` at the scale of the keys' similarities."""
    if run.config.generate.temperatures:
        return run.config.generate.temperatures
    if system == "trime":
        return tuple(run.config.train.temperature * share for share in (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0))
    scale = hidden if run.config.index.metric == "l2" else hidden**0.5
    return tuple(scale * share for share in _GRID)
