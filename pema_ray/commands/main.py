"""The `pema-ray` command: PEMA's stages, `quickstart`, which runs them all, services, and the other families."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pema_ray.commands import config as config_commands
from pema_ray.commands import memory as memory_commands
from pema_ray.commands import pluglm as pluglm_commands
from pema_ray.commands import trime as trime_commands
from pema_ray.commands.stages import Config, Overrides, add_stages, guarded_command, settings_help
from pema_ray.errors import UserError
from pema_ray.pema.config import load_config
from pema_ray.pema.method import PEMA
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.progress import console
from pema_ray.runtime.settings import validate
from pema_ray.tasks import list_tasks, load_task

app = typer.Typer(
    help="Adapt a language model you cannot see. Every stage reads an experiment's YAML file, keeps its results in the "
    "experiment's run_dir, and is skipped when they are already there with the same settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(config_commands.app, name="config")
app.add_typer(memory_commands.app, name="memory")
app.add_typer(trime_commands.app, name="trime")
app.add_typer(pluglm_commands.app, name="pluglm")


@app.command("quickstart")
@guarded_command
def quickstart(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="Another experiment to run from end to end.")] = Path(
        "configs/quickstart.yaml"
    ),
) -> None:
    """Run every stage of a small real experiment: archaic to modern English with SmolLM2-135M, on a local Ray."""
    from pema_ray.pema.run import Run

    experiment = load_config(config, overrides or [])
    unfinished = any(Run(experiment).finished(stage) is None for stage in PEMA.chain)
    with ray_cluster(experiment.ray) if unfinished else nullcontext():
        for stage in PEMA.chain:
            PEMA.run(stage, experiment)
    console.print(f"Report: {Run(experiment).path('report', 'report.html')}")


@app.command("prepare", help=PEMA.stages["prepare"].does, epilog=settings_help(PEMA, "prepare"))
def prepare(
    overrides: Overrides = None,
    config: Config = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped tasks and stop.")] = False,
) -> None:
    if list_:
        for name in list_tasks():
            typer.echo(f"{name:14} {load_task(name).description}")
        return
    raise typer.Exit(PEMA.run_stage("prepare", config, overrides or []))


add_stages(app, PEMA, "prepare")


@app.command("serve")
@guarded_command
def serve(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="An experiment whose trained adapter is served, over its PLM."),
    ] = None,
    topology: Annotated[
        Path | None, typer.Option("--topology", "-t", help="Or a Serve config file, such as serve_configs/local.yaml.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where the API listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where the API listens.")] = 8000,
) -> None:
    """Serve an experiment's adapter on this machine until Ctrl-C: OpenAI's API, over the PLM that `plm` names."""
    from pema_ray.pema.serving.run import serve_experiment, serve_topology

    if topology is not None:
        if config is not None or overrides:
            raise UserError("--topology takes all settings from its file; leave out --config and settings.")
        serve_topology(topology)
    else:
        serve_experiment(config, overrides or [], host, port)


@app.command("two-owners")
@guarded_command
def two_owners(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="The experiment that the data owner runs.")] = Path(
        "configs/quickstart.yaml"
    ),
    folder: Annotated[Path, typer.Option(help="Gets a folder for each organisation.")] = Path("runs/two_owners"),
) -> None:
    """Run two organisations on this machine: a PLM owner behind TLS and a key, and a data owner without weights."""
    from pema_ray.pema.demonstration.two_owners import run

    run(config, folder, overrides or [])


@app.command("serve-key")
@guarded_command
def serve_key(
    keys: Annotated[Path, typer.Argument(help="The file of keys; created if missing.")],
    name: Annotated[str, typer.Argument(help="The data owner's name; an existing one gets a new key.")],
    rows_per_minute: Annotated[int | None, typer.Option(help="Representations per minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens per minute.")] = None,
    sessions: Annotated[int | None, typer.Option(help="Concurrent sessions.")] = None,
) -> None:
    """PLM owner: give a data owner a key. Prints it once; the file keeps a hash."""
    from pema_ray.plm_owner.service.access import Quota, add_client

    limits = {"rows_per_minute": rows_per_minute, "tokens_per_minute": tokens_per_minute, "sessions": sessions}
    typer.echo(add_client(keys, name, validate(Quota, limits, "quota")))


@app.command("import-adapter")
@guarded_command
def import_adapter(
    prediction: Annotated[Path, typer.Argument(help="The published code's state dict of stage 2 or 3.")],
    new: Annotated[Path, typer.Argument(help="The new adapter's folder.")],
    bundle: Annotated[Path, typer.Option(help="The LM-head bundle of the PLM it was trained for (export-head).")],
    reconstruction: Annotated[
        Path | None, typer.Option(help="The state dict of stage 1; not needed to generate.", show_default="none")
    ] = None,
) -> None:
    """Convert a checkpoint of the published PEMA code to an adapter."""
    from pema_ray.data_owner.adapter.pema import PemaAdapter
    from pema_ray.line import LMHeadBundle

    if new.exists():
        raise UserError(f"{new}: exists already. Choose another folder for the new adapter.")
    adapter = PemaAdapter.from_published(prediction, LMHeadBundle.load(bundle).card, reconstruction)
    adapter.save_pretrained(new)
    console.print(f"{new}: rank {adapter.config.rank}, {adapter.config.plm_name}", highlight=False)


def main() -> None:
    sys.exit(app())
