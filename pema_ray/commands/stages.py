"""Commands of stages, made from a method's table. Knows no method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pema_ray.experiment.method import Method
from pema_ray.experiment.process import guarded

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="An experiment's YAML file, as in configs/.", show_default="built-in defaults"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Change single settings: seed=1.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count parameters, updates, rows, bytes and hours, and stop.")]


def add_stages(app: typer.Typer, method: Method[Any], *apart: str) -> None:
    """Add the commands of a method's stages, but those that are added apart."""
    for stage, one in method.stages.items():
        if one.module is not None and stage not in apart:
            _add_stage(app, method, stage)


def _add_stage(app: typer.Typer, method: Method[Any], stage: str) -> None:
    def run(config: Path | None = None, overrides: Overrides = None) -> None:
        raise typer.Exit(method.run_stage(stage, config, overrides or []))

    help_text = f"An experiment's YAML file, such as {method.example_of(stage)}."
    if method.needs_file(stage):
        run.__annotations__["config"] = Annotated[Path, typer.Option("--config", "-c", help=help_text)]
        run.__defaults__ = (..., None)  # typer's mark of what is required
    else:
        option = typer.Option("--config", "-c", help=help_text, show_default="built-in defaults")
        run.__annotations__["config"] = Annotated[Path | None, option]
    app.command(method.subcommand(stage), help=method.stages[stage].does, epilog=settings_help(method, stage))(run)


def add_training(app: typer.Typer, method: Method[Any], stage: str, dry_run_module: str) -> None:
    """Add a training stage with `--dry-run`, which prints what `estimate(config)` of a module counts."""

    @app.command(method.subcommand(stage), help=method.stages[stage].does, epilog=settings_help(method, stage))
    def train(overrides: Overrides = None, config: Config = None, dry_run: DryRun = False) -> None:
        if not dry_run:
            raise typer.Exit(method.run_stage(stage, config, overrides or []))

        def work() -> None:
            from importlib import import_module

            from pema_ray.runtime.progress import console

            console.print(import_module(dry_run_module).estimate(method.read(stage, config, overrides or [])).table())

        raise typer.Exit(guarded(work))


def settings_help(method: Method[Any], stage: str) -> str | None:
    """The settings that a stage reads, as a command's epilog."""
    described = [
        f"[bold]{one.key}[/]{escape('=' + one.default if one.default else '')}  {escape(one.meaning)}"
        for one in method.settings_of(stage)
    ]
    return "Settings:\n\n" + "\n\n".join(described) if described else None
