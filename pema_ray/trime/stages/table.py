"""The demonstration: TRIME's objectives beside the plain language model, its cache and kNN-LM, in one table.

For every seed each objective is trained for the same number of updates, and then for as many as fit into the plain
model's time (`pace.json` says how long an update of each takes); every model is evaluated by all its systems. All runs
share one prepared corpus. A finished run is not repeated. Imports no model: it runs the stages.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import console
from pema_ray.runtime.settings import Section, validate
from pema_ray.trime.config import MemoryKind, TrimeConfig
from pema_ray.trime.evaluation.results import SystemScores, TrimeEvaluation, shown
from pema_ray.trime.evaluation.systems import needs_datastore
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages import batches as walk
from pema_ray.trime.stages import datastore as build_datastore
from pema_ray.trime.stages import evaluate, prepare, report, train
from pema_ray.trime.stages import index as build_index
from pema_ray.trime.training.update_time import seconds_per_update

_ORDERS: dict[MemoryKind, str] = {"none": "random", "local": "random", "long": "keep", "ext": "bm25"}
_MODELS: dict[MemoryKind, str] = {"none": "CE", "local": "TrimeLM", "long": "TrimeLM_long", "ext": "TrimeLM_ext"}
FinishedRun = tuple[TrimeEvaluation, dict[str, Any]]  # its evaluation and the metrics of its training
STEPS, TIME = "equal steps", "equal time"


class Row(Section):
    """One system of one objective over all seeds."""

    budget: str
    """`equal steps` or `equal time`."""
    memory: MemoryKind
    system: str
    label: str
    datastore: str | None
    dev_nll: tuple[float, ...]
    test_nll: tuple[float, ...]
    """Of each seed."""
    updates: tuple[int, ...]
    training_seconds: tuple[float, ...]


class Table(Section):
    """`table.json`."""

    corpus: str
    tokens: dict[str, int]
    """Of dev and test the scored ones (`evaluate.max_tokens`)."""
    parameters: int
    segment: int
    seeds: tuple[int, ...]
    per_character: bool
    rows: tuple[Row, ...]


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `<run_dir>/table.json` and `<run_dir>/table.md`, with a folder for every run beside them."""
    c = config
    root = Path(c.run_dir).absolute()
    base = validate(TrimeConfig, _with_prepare_seed(c), "table")
    runs: dict[tuple[str, MemoryKind], list[FinishedRun]] = {}
    with ray_cluster(c.ray, max(c.train.cpus_per_worker, c.datastore.cpus_per_actor), readers=1):
        prepare.run(base)
        equal = _equal_time(base, root) if "none" in c.table.memories else {}
        for seed in c.table.seeds:
            for memory in c.table.memories:
                budgets = [(STEPS, c.train.updates), *([(TIME, equal[memory])] if memory in equal else [])]
                for budget, updates in budgets:
                    runs.setdefault((budget, memory), []).append(_run(base, root, seed, memory, budget, updates))
                    _write(root, _table(base, runs))
    table = _table(base, runs)
    console.print(markdown(table), markup=False, highlight=False)
    return {"summary": f"{len(table.rows)} rows of {len(table.seeds)} seeds: {root / 'table.md'}"}


def _write(root: Path, table: Table) -> None:
    """After every run, so that an unfinished table can be read."""
    with atomic_file(root / "table.json") as temporary:
        temporary.write_text(table.model_dump_json(indent=1) + "\n")
    with atomic_file(root / "table.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")


def _with_prepare_seed(config: TrimeConfig) -> dict[str, Any]:
    """The settings with one split of the corpus for every seed."""
    settings = config.model_dump()
    settings["prepare"]["seed"] = config.seed if config.prepare.seed is None else config.prepare.seed
    return settings


def _name(seed: int, memory: MemoryKind, budget: str) -> str:
    return f"seed{seed}_{memory}" + ("_time" if budget == TIME else "")


def _equal_time(base: TrimeConfig, root: Path) -> dict[MemoryKind, int]:
    """Updates of each TRIME objective in the plain model's time; paces are kept, since a table may be resumed."""
    path, updates = root / "pace.json", base.train.updates
    memories = base.table.memories
    configs: dict[MemoryKind, TrimeConfig] = {m: settings_of(base, root, 0, m, TIME, updates) for m in memories}
    stamps = {m: _stamp_of_pace(configs[m]) for m in memories}
    saved = json.loads(path.read_text()) if path.exists() else {}
    saved_stamps, pace = saved.get("stamps", {}), saved.get("seconds", {})
    missing: list[MemoryKind] = [m for m in memories if saved_stamps.get(m) != stamps[m]]
    if missing:
        console.print("How long an update of each objective takes, in turns", highlight=False)
        if "none" in missing:  # the others are relative to it
            saved_stamps, pace, missing = {}, {}, list(memories)
        run = TrimeRun(base)
        measured: dict[MemoryKind, TrimeConfig] = {m: configs[m] for m in memories if m in ("none", *missing)}
        seconds = seconds_per_update(measured, run.path("prepare"), run.metrics("prepare")["vocabulary"])
        scale = pace.get("none", seconds["none"]) / seconds["none"]  # paces measured before stay as they are
        pace |= {m: seconds[m] * scale for m in missing}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"stamps": saved_stamps | stamps, "seconds": pace}, indent=1) + "\n")
    return {memory: max(1, int(updates * pace["none"] / pace[memory])) for memory in memories if memory != "none"}


def _stamp_of_pace(config: TrimeConfig) -> str:
    """Of all settings that the time of an update depends on."""
    settings = config.model_dump(mode="json", include={"prepare", "model", "batches", "train"})
    del settings["train"]["updates"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def settings_of(base: TrimeConfig, root: Path, seed: int, memory: MemoryKind, budget: str, updates: int) -> TrimeConfig:
    """The experiment of one run: the table's, with its objective and that objective's order of batches."""
    changed = base.model_copy(
        update={
            "run_dir": str(root / _name(seed, memory, budget)),
            "seed": seed,
            "batches": base.batches.model_copy(update={"order": _ORDERS[memory]}),
            "train": base.train.model_copy(update={"memory": memory, "updates": updates}),
        }
    )
    settings = changed.model_dump()
    for key, value in base.table.settings.get(memory, {}).items():
        *sections, last = key.split(".")
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return validate(TrimeConfig, settings, f"table.settings.{memory}")


def _run(base: TrimeConfig, root: Path, seed: int, memory: MemoryKind, budget: str, updates: int) -> FinishedRun:
    """Train and evaluate one model; finished stages are reused."""
    config = settings_of(base, root, seed, memory, budget, updates)
    run = TrimeRun(config)
    console.print(f"[bold]{_MODELS[memory]}[/], seed {seed}, {budget}: {config.train.updates:,} updates")
    _share_corpus(base, run)
    if config.batches.order == "bm25":
        walk.run(config)
    train.run(config)
    if needs_datastore(config):
        build_datastore.run(config)
        build_index.run(config)
    evaluate.run(config)
    report.run(config)
    return TrimeEvaluation.load(run.path("evaluate")), run.metrics("train")


def _share_corpus(base: TrimeConfig, run: TrimeRun) -> None:
    """Make `prepare/` of a run a link to the table's."""
    run.folder.mkdir(parents=True, exist_ok=True)
    link, shared = run.path("prepare"), TrimeRun(base).path("prepare")
    if not link.is_symlink():
        link.symlink_to(shared, target_is_directory=True)


def _table(base: TrimeConfig, runs: Mapping[tuple[str, MemoryKind], list[FinishedRun]]) -> Table:
    rows = []
    for (budget, memory), seeds in runs.items():
        evaluations, trainings = zip(*seeds)
        for place, first in enumerate(evaluations[0].scores):
            scores: list[SystemScores] = [evaluation.scores[place] for evaluation in evaluations]
            rows.append(
                Row(
                    budget=budget,
                    memory=memory,
                    system=first.system,
                    label=first.label,
                    datastore=first.datastore,
                    dev_nll=tuple(score.dev_nll for score in scores),
                    test_nll=tuple(score.test_nll for score in scores),
                    updates=tuple(training["updates"] for training in trainings),
                    training_seconds=tuple(training["training_seconds"] for training in trainings),
                )
            )
    first, training = next(iter(runs.values()))[0]
    tokens = {"train": TrimeRun(base).metrics("prepare")["splits"]["train"]["tokens"], **first.tokens}
    corpus = base.prepare.corpus if base.prepare.corpus != "files" else ", ".join(
        Path(name).name for names in base.prepare.files.values() for name in names
    )  # fmt: skip
    return Table(
        corpus=corpus,
        tokens=tokens,
        parameters=training["parameters"],
        segment=base.batches.segment,
        seeds=base.table.seeds,
        per_character=first.per_character,
        rows=tuple(sorted(rows, key=lambda row: row.budget)),  # stable: steps before time
    )


def markdown(table: Table) -> str:
    """The table, budget by budget; the plain model's rows stand under both, for comparison."""
    unit = "bits per character" if table.per_character else "perplexity"
    lines = [
        f"{table.corpus}: {', '.join(f'{n:,} {split}' for split, n in table.tokens.items())} tokens; "
        f"{table.parameters:,} parameters, L = {table.segment}; {_seeds(table)}; "
        "τ, λ, T chosen on dev.",
    ]
    for budget in (STEPS, TIME):
        rows = [row for row in table.rows if row.budget == budget]
        if not rows:
            continue
        if budget == TIME:
            rows = [row for row in table.rows if row.memory == "none"] + rows
        lines += ["", f"**At {budget}**", "", f"| model | evaluated with | updates | dev {unit} | test {unit} |"]
        lines += ["|---|---|---|---|---|"]
        best = min(rows, key=lambda row: statistics.mean(row.test_nll))
        for row in rows:
            dev, test = (mean_and_sd(nlls, table.per_character) for nlls in (row.dev_nll, row.test_nll))
            test = f"**{test}**" if row is best else test
            updates = f"{round(statistics.mean(row.updates)):,}"
            lines.append(f"| {_MODELS[row.memory]} | {row.label} | {updates} | {dev} | {test} |")
    return "\n".join(lines) + "\n"


def _seeds(table: Table) -> str:
    """How many each row has; in an unfinished table some have one fewer."""
    counts = sorted({len(row.test_nll) for row in table.rows})
    return "one seed" if counts == [1] else f"mean ± sd of {' to '.join(map(str, counts))} seeds"


def mean_and_sd(nlls: Sequence[float], per_character: bool) -> str:
    """Mean and deviation of perplexity or bits, over seeds."""
    values = [nll / math.log(2) if per_character else math.exp(nll) for nll in nlls]
    if len(values) == 1:
        return shown(nlls[0], per_character)
    digits = 3 if per_character else 2
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
