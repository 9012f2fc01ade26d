"""`pema-ray config`: what a configuration file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema_ray.commands.stages import Overrides
from pema_ray.experiment.process import guarded

app = typer.Typer(help="Explain configuration files.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Keeps `explain` a command of its own while it is the only one."""


@app.command("explain")
def explain(
    file: Annotated[Path, typer.Argument(help="A YAML file of any method, as in configs/.")],
    overrides: Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from its default.")] = False,
) -> None:
    """Print every setting: its value, its default, what it means, and the commands that read it."""

    def work() -> None:
        from pema_ray.experiment.explain import explain
        from pema_ray.pema.method import PEMA
        from pema_ray.pluglm.method import PLUGLM
        from pema_ray.trime.method import TRIME
        from pema_ray.trime.translation.method import TRANSLATION

        method, settings = explain((PEMA, TRIME, TRANSLATION, PLUGLM), file, overrides or [])
        typer.echo(f"# {file}, as the commands of `{method.prefix}` read it. YAML writes 'none' as null.")
        if changed and not any(one.is_changed for one in settings):
            typer.echo("All settings have their defaults.")
        for one in settings:
            if one.is_changed or not changed:
                usual = "" if one.default in (None, one.value) else f"  (default {one.default})"
                typer.echo(f"{one.key}: {one.value}{usual}")
                typer.echo(f"    {one.meaning} Read by {', '.join(one.read_by)}.".replace("     ", "    "))

    raise typer.Exit(guarded(work))
