"""What all commands share: how they end, and the commands of stages, made from a method's table. Knows no method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pema_ray.experiment.method import Method
from pema_ray.experiment.process import guarded
from pema_ray.runtime.progress import console

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="An experiment's YAML file, as in configs/.", show_default="built-in defaults"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Change single settings: seed=1.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count parameters, updates, rows, bytes and hours, and stop.")]


def guarded_command(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the exit codes and one-line errors of `guarded`."""

    @wraps(command)
    def run(**parameters: Any) -> None:
        raise typer.Exit(guarded(partial(command, **parameters)))

    return run


def add_stages(app: typer.Typer, method: Method[Any], *excluded: str) -> None:
    """Add the commands of a method's stages, but those excluded."""
    for name, stage in method.stages.items():
        if stage.module is not None and name not in excluded:
            _add_stage(app, method, name)


def _add_stage(app: typer.Typer, method: Method[Any], stage: str) -> None:
    def run(config: Path | None = None, overrides: Overrides = None) -> None:
        raise typer.Exit(method.run_stage(stage, config, overrides or []))

    help_text = f"An experiment's YAML file, such as {method.example_of(stage)}."
    if method.needs_file(stage):
        run.__annotations__["config"] = Annotated[Path, typer.Option("--config", "-c", help=help_text)]
        run.__defaults__ = (..., None)  # typer's mark of a required option
    else:
        option = typer.Option("--config", "-c", help=help_text, show_default="built-in defaults")
        run.__annotations__["config"] = Annotated[Path | None, option]
    app.command(method.subcommand(stage), help=method.stages[stage].does, epilog=settings_help(method, stage))(run)


def add_training(app: typer.Typer, method: Method[Any], stage: str, dry_run_module: str) -> None:
    """Add a training stage with `--dry-run`, which prints a module's `estimate(config)`."""

    @app.command(method.subcommand(stage), help=method.stages[stage].does, epilog=settings_help(method, stage))
    @guarded_command
    def train(overrides: Overrides = None, config: Config = None, dry_run: DryRun = False) -> None:
        if not dry_run:
            raise typer.Exit(method.run_stage(stage, config, overrides or []))
        console.print(import_module(dry_run_module).estimate(method.read(stage, config, overrides or [])).table())


def settings_help(method: Method[Any], stage: str) -> str | None:
    """The settings that a stage reads, as a command's epilog."""
    described = [
        f"[bold]{setting.key}[/]{escape('=' + setting.default if setting.default else '')}  {escape(setting.meaning)}"
        for setting in method.settings_of(stage)
    ]
    return "Settings:\n\n" + "\n\n".join(described) if described else None
