"""`pema-ray compare`: PEMA and its peers on the same pairs, as a table with seeds, intervals and significance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from pema_ray.errors import UserError
from pema_ray.evaluation.comparison import Comparison, Peer, markdown, significance
from pema_ray.line import BlockingPLM
from pema_ray.pema.baselines.variants import PREFIXES, check
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.plm import connect
from pema_ray.pema.run import Run
from pema_ray.pema.stages.answers import read_rows
from pema_ray.pema.stages.systems import ComparedSystem, scorer_of
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import console

_REFERENCE = "pema"


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `compare/comparison.json` and `compare/table.md`."""
    run, settings = Run(config), config.compare
    if config.generate.split != "test":
        raise UserError(
            f"generate.split={config.generate.split}: compare needs test, since all systems are tuned on dev."
        )
    if config.plm.prefix is not None:
        raise UserError("compare measures the PLM alone and with other prompts: leave plm.prefix out.")
    for name in settings.systems:  # fail now, not after the other systems have finished
        check(config, name)
    if not PREFIXES.keys().isdisjoint(settings.systems) and run.finished("compare") is None:
        with BlockingPLM(connect(config.plm)) as plm:
            if plm.describe().prefix_shape is None:
                raise UserError(
                    f"compare.systems: {config.plm.label} takes no prefixes: leave out {' and '.join(PREFIXES)}."
                )

    def work() -> dict[str, Any]:
        with _cluster(run):
            peers = {name: _peer(run, name) for name in settings.systems}
        comparison = _comparison(run, peers)
        with atomic_file(run.path("compare", "comparison.json")) as temporary:
            temporary.write_text(comparison.model_dump_json(indent=1) + "\n")
        with atomic_file(run.path("compare", "table.md")) as temporary:
            temporary.write_text(markdown(comparison), encoding="utf-8")
        console.print(markdown(comparison), markup=False, highlight=False)
        best = max(comparison.peers, key=lambda peer: peer.bleu)
        return {
            "bleu": {peer.name: round(peer.bleu, 2) for peer in comparison.peers},
            "nll": {peer.name: peer.mean("nll") for peer in comparison.peers},
            "summary": f"{len(peers)} systems, best sBLEU {best.bleu:.1f} ({best.name})",
        }

    return run.perform("compare", work)


@contextmanager
def _cluster(run: Run) -> Iterator[None]:
    """Ray with room for generation and, if anything is trained, for all training workers."""
    config = run.config
    t, g = config.train, config.generate
    cluster = partial(ray_cluster, config.ray, placement=config.placement)
    training = nullcontext()
    if any(ComparedSystem(run, name, config.seed).is_trained for name in config.compare.systems):
        training = cluster(t.cpus_per_worker, t.gpus_per_worker, t.min_workers or t.workers)
    with cluster(g.cpus_per_actor, g.gpus_per_actor, readers=1), training:
        yield


def _peer(run: Run, name: str) -> Peer:
    """A system's row: one measurement, or one for each seed where something is trained."""
    first = ComparedSystem(run, name, run.config.seed)
    count = run.config.compare.seeds if first.is_trained and name not in run.config.compare.single_seed else 1
    systems = [first, *(ComparedSystem(run, name, run.config.seed + n) for n in range(1, count))]
    return Peer(name=first.label, given=first.given, measurements=tuple(system.measurement() for system in systems))


def _comparison(run: Run, peers: dict[str, Peer]) -> Comparison:
    config, pairs = run.config, run.metrics("prepare")["pairs"]
    options, samples = config.generate, config.compare.bootstrap_samples
    beams = f" {options.beams}" if options.decoding == "beam" else ""
    scorer = scorer_of(run)
    texts = {}
    for name, peer in peers.items():
        path = ComparedSystem(run, name, peer.measurements[0].seed).answers
        texts[name] = [row["answer"] for row in read_rows(path)]
        scorer.score(texts[name])
    by_system = {}
    if samples and _REFERENCE in peers and len(peers) > 1:
        by_system = significance(scorer, texts, _REFERENCE, samples)
    return Comparison(
        task=run.task.name,
        plm_name=run.bundle.card.name,
        train_pairs=config.train.max_train_pairs or pairs["train"],
        test_pairs=len(run.pairs(options.split)),
        decoding=options.decoding + beams,
        bleu_signature=scorer.signatures[0],
        reference=peers[_REFERENCE].name if by_system else None,
        bootstrap_samples=samples if by_system else 0,
        peers=tuple(peer.model_copy(update={"significance": by_system.get(name)}) for name, peer in peers.items()),
    )
