"""`pema-ray trime mt-train | mt-datastore | mt-generate`, and the jobs of the same names: a skin over `trime.mt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from pema_ray.pema.stages.main import guarded

STAGES = {
    "mt-train": ("train", "Prepare parallel text, order it by BM25, and train an encoder-decoder. Resumes."),
    "mt-datastore": ("datastore", "Keep the decoder key of every training target position, and index them. Resumes."),
    "mt-generate": ("generate", "Translate the test split: plain, by kNN-MT or by TrimeMT; score by sacreBLEU."),
}
Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Such as configs/trime/mt_bible_trime.yaml.", show_default="built-in defaults"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Such as train.epochs=4.", show_default=False),
]


def run_stage(name: str, config: Path | None, overrides: Sequence[str]) -> int:
    """One stage of a translation experiment; returns the exit code."""

    return guarded(lambda: import_module(f"pema_ray.trime.mt.{STAGES[name][0]}").run(_read(config, overrides)))


def _read(config: Path | None, overrides: Sequence[str]) -> Any:
    from pema_ray.experiment.configuration import read_config
    from pema_ray.trime.mt.config import MtConfig

    return read_config(MtConfig, config, overrides)


def job(name: str) -> None:
    """Entry point of `jobs/trime_mt_<stage>.py`: `--config <file> [section.key=value ...]`."""
    parser = argparse.ArgumentParser(description=STAGES[name][1])
    parser.add_argument("--config", type=Path, required=True, help="an experiment's YAML file, configs/trime/mt_*")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    arguments = parser.parse_args()
    sys.exit(run_stage(name, arguments.config, arguments.overrides))


def register(app: typer.Typer) -> None:
    """Add the stages to `pema-ray trime`."""
    _add_training(app)
    for name in ("mt-datastore", "mt-generate"):
        _add(app, name)


def _add(app: typer.Typer, name: str) -> None:
    @app.command(name, help=STAGES[name][1])
    def run(overrides: Overrides = None, config: Config = None) -> None:
        raise typer.Exit(run_stage(name, config, overrides or []))


def _add_training(app: typer.Typer) -> None:
    @app.command("mt-train", help=STAGES["mt-train"][1])
    def train(
        overrides: Overrides = None,
        config: Config = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Count parameters, updates, rows, bytes and hours, and stop.")
        ] = False,
    ) -> None:
        if not dry_run:
            raise typer.Exit(run_stage("mt-train", config, overrides or []))

        def work() -> None:
            from pema_ray.runtime.progress import console
            from pema_ray.trime.mt.dry_run import estimate

            console.print(estimate(_read(config, overrides or [])).table())

        raise typer.Exit(guarded(work))
