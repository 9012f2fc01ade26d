"""`pema-ray trime …`: language models trained with memory, stage by stage.

A thin skin over `pema_ray.trime`; `stage_command` makes a command of any stage there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape

from pema_ray.commands.trime_mt import register as register_translation
from pema_ray.pema.stages.main import guarded
from pema_ray.runtime.settings import Section

app = typer.Typer(
    help="TRIME: language models trained with memory, and evaluated with local, long and external memory. Stages read "
    "an experiment's YAML file (configs/trime/), and keep their results in its run_dir.",
    no_args_is_help=True,
)
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Such as configs/trime/bible_local.yaml.", show_default="built-in defaults"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Change single settings, such as train.updates=200.", show_default=False
    ),
]


class Stage(NamedTuple):
    module: str
    """Has `run(config) -> dict`."""
    sections: tuple[str, ...]
    """What it reads of the configuration, beside `run_dir` and `seed`."""
    help: str


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "pema_ray.trime.prepare",
        ("prepare", "ray"),
        "Read the corpus, make its vocabulary, and keep token ids as Parquet shards.",
    ),
    "batches": Stage(
        "pema_ray.trime.walk",
        ("batches", "ray"),
        "Of batches.order=bm25: search every segment's nearest ones, and walk from each to the next.",
    ),
    "train": Stage(
        "pema_ray.trime.train",
        ("model", "batches", "train", "plan", "ray"),
        "Train the language model with its memory by Ray Train. Resumes.",
    ),
    "datastore": Stage(
        "pema_ray.trime.build_datastore",
        ("datastore", "ray"),
        "Keep the key and the next token of every training position, by model actors on Ray Data. Resumes.",
    ),
    "index": Stage(
        "pema_ray.trime.build_index",
        ("index", "ray"),
        "Index the datastore with faiss, part by part, and measure recall against exact search. Resumes.",
    ),
    "evaluate": Stage(
        "pema_ray.trime.evaluate",
        ("evaluate", "ray"),
        "Calibrate every way of evaluating the model on dev, and score it on test: one table.",
    ),
    "report": Stage(
        "pema_ray.trime.report",
        (),
        "One HTML page: the table, loss curves, perplexity against memory size, k and λ, and what raised each token.",
    ),
    "table": Stage(
        "pema_ray.trime.table",
        ("table", "ray"),
        "The demonstration: every objective with every seed, at equal steps and equal time, from corpus to one table. "
        "Resumes.",
    ),
}


def run_stage(name: str, config: Path | None, overrides: Sequence[str]) -> int:
    """One stage of a TRIME experiment; returns the exit code."""
    return guarded(lambda: import_module(STAGES[name].module).run(_read(config, overrides)))


def job(name: str) -> None:
    """Entry point of `jobs/trime_<stage>.py`: `--config <file> [section.key=value ...]`."""
    settings = "\n".join(f"  {key}{default}\n      {meaning}" for key, default, meaning in _settings(name))
    parser = argparse.ArgumentParser(
        description=STAGES[name].help,
        epilog=f"settings:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="an experiment's YAML file, of configs/trime/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    arguments = parser.parse_args()
    sys.exit(run_stage(name, arguments.config, arguments.overrides))


def _read(config: Path | None, overrides: Sequence[str]) -> Any:
    from pema_ray.experiment.configuration import read_config
    from pema_ray.trime.config import TrimeConfig

    return read_config(TrimeConfig, config, overrides)


def _settings(stage: str) -> Iterator[tuple[str, str, str]]:
    """(key, `=default`, meaning) of every setting that a stage reads."""
    from pema_ray.trime.config import TrimeConfig

    def of(prefix: str, section: Any) -> Iterator[tuple[str, str, str]]:
        for name, field in section.model_fields.items():
            if isinstance(field.default, Section):
                yield from of(f"{prefix}.{name}", type(field.default))
            else:
                unset = field.default in (None, (), {})
                yield f"{prefix}.{name}", "" if unset else f"={field.default}", field.description or ""

    for name in STAGES[stage].sections:
        yield from of(name, TrimeConfig.model_fields[name].annotation)


def _epilog(stage: str) -> str:
    told = (f"[bold]{key}[/]{escape(default)}  {escape(meaning)}" for key, default, meaning in _settings(stage))
    return "Settings:\n\n" + "\n\n".join(told)


def stage_command(name: str) -> Callable[..., None]:
    """The plain command of a stage: settings in, exit code out."""

    @app.command(name, help=STAGES[name].help, epilog=_epilog(name))
    def run(overrides: Overrides = None, config: Config = None) -> None:
        raise typer.Exit(run_stage(name, config, overrides or []))

    return run


# ── corpus and model ────────────────────────────────────────────────────────

stage_command("prepare")
stage_command("batches")


@app.command("train", help=STAGES["train"].help, epilog=_epilog("train"))
def train(
    overrides: Overrides = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count parameters, updates, rows, bytes and hours, and stop.")
    ] = False,
) -> None:
    """Train, or say what training would take."""
    if not dry_run:
        raise typer.Exit(run_stage("train", config, overrides or []))

    def work() -> None:
        from pema_ray.runtime.progress import console
        from pema_ray.trime.dry_run import estimate

        console.print(estimate(_read(config, overrides or [])).table())

    raise typer.Exit(guarded(work))


# ── datastore, index, evaluation, report ────────────────────────────────────

for _name in ("datastore", "index", "evaluate", "report", "table"):
    stage_command(_name)


@app.command("explain")
def explain(
    text: Annotated[Path, typer.Argument(help="A text file.")],
    page: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    overrides: Overrides = None,
    config: Config = None,
    system: Annotated[str | None, typer.Option(help="Such as ext_knn; none: the best on dev.")] = None,
) -> None:
    """A page that shows, for a text, which memory entries raised the probability of each token."""

    def work() -> None:
        from pema_ray.errors import UserError
        from pema_ray.runtime.progress import console
        from pema_ray.trime.explain import explain_text
        from pema_ray.trime.report import write_page
        from pema_ray.trime.results import TrimeEvaluation
        from pema_ray.trime.run import TrimeRun

        run = TrimeRun(_read(config, overrides or []))
        run.metrics("evaluate")
        if not text.is_file():
            raise UserError(f"{text}: no such file.")
        found = TrimeEvaluation.load(run.path("evaluate"))
        write_page(explain_text(run, found, system, text.read_text(encoding="utf-8"), text.name), page)
        console.print(f"{page}", markup=False, highlight=False)

    raise typer.Exit(guarded(work))


# ── service ─────────────────────────────────────────────────────────────────


# ── machine translation ─────────────────────────────────────────────────────

register_translation(app)
