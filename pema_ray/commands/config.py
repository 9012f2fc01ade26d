"""`pema-ray config`: explain configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema_ray.commands.stages import Overrides, guarded_command
from pema_ray.pema.method import PEMA
from pema_ray.pluglm.method import PLUGLM
from pema_ray.trime.method import TRIME
from pema_ray.trime.translation.method import TRANSLATION

app = typer.Typer(help="Explain configuration files.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Makes `explain` a subcommand although it is the only one."""


@app.command("explain")
@guarded_command
def explain(
    file: Annotated[Path, typer.Argument(help="A YAML file of any method, as in configs/.")],
    overrides: Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from its default.")] = False,
) -> None:
    """Print every setting: its value, its default, what it means, and the commands that read it."""
    from pema_ray.experiment.explain import explain

    method, settings = explain((PEMA, TRIME, TRANSLATION, PLUGLM), file, overrides or [])
    typer.echo(f"# {file}, as the commands of `{method.prefix}` read it. YAML writes 'none' as null.")
    if changed and not any(setting.is_changed for setting in settings):
        typer.echo("All settings have their defaults.")
    for setting in settings:
        if setting.is_changed or not changed:
            default = "" if setting.default in (None, setting.value) else f"  (default {setting.default})"
            typer.echo(f"{setting.key}: {setting.value}{default}")
            typer.echo(f"    {setting.meaning} Read by {', '.join(setting.read_by)}.".replace("     ", "    "))
