"""The `pema-ray` command: one thin command per stage, and `quickstart`, which runs them all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pema_ray.commands import memory as memory_commands
from pema_ray.commands import pluglm as pluglm_commands
from pema_ray.commands import trime as trime_commands
from pema_ray.errors import UserError
from pema_ray.pema.stages.main import guarded, run_stage, stages
from pema_ray.pema.stages.settings import settings_of

app = typer.Typer(
    help="Adapt a language model you cannot see. Every stage reads an experiment's YAML file, keeps its results in the "
    "experiment's run_dir, and is skipped when they are already there with the same settings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(memory_commands.app, name="memory")
app.add_typer(trime_commands.app, name="trime")
app.add_typer(pluglm_commands.app, name="pluglm")
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="An experiment's YAML file, such as configs/bible_modern.yaml.",
        show_default="built-in defaults",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...", help="Change single settings, such as train.rank=64.", show_default=False
    ),
]


def _settings(stage: str) -> str | None:
    described = [
        f"[bold]{one.key}[/]{escape('=' + one.default if one.default else '')}  {escape(one.meaning)}"
        for one in settings_of(stage)
    ]
    return "Settings:\n\n" + "\n\n".join(described) if described else None


def _command(stage: str, name: str, help: str) -> None:
    @app.command(name, help=help, epilog=_settings(stage))
    def run(overrides: Overrides = None, config: Config = None) -> None:
        raise typer.Exit(run_stage(stage, config, overrides or []))


@app.command("quickstart")
def quickstart(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="Another experiment to run from end to end.")] = Path(
        "configs/quickstart.yaml"
    ),
) -> None:
    """Run every stage of a small real experiment: archaic to modern English with SmolLM2-135M, on a local Ray."""

    def work() -> None:
        from contextlib import nullcontext

        from pema_ray.pema.config import load_config
        from pema_ray.pema.run import STAGES, Run
        from pema_ray.runtime.cluster import ray_cluster
        from pema_ray.runtime.progress import console

        experiment = load_config(config, overrides or [])
        unfinished = any(Run(experiment).finished(stage) is None for stage in STAGES)
        with ray_cluster(experiment.ray) if unfinished else nullcontext():
            for run in stages().values():
                run(experiment)
        console.print(f"Report: {Run(experiment).path('report', 'report.html')}")

    raise typer.Exit(guarded(work))


@app.command("prepare", epilog=_settings("prepare"))
def prepare(
    overrides: Overrides = None,
    config: Config = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped tasks and stop.")] = False,
) -> None:
    """Read the task's pairs, check every one, and keep them in the run folder."""
    if list_:
        from pema_ray.tasks import list_tasks, load_task

        for name in list_tasks():
            typer.echo(f"{name:14} {load_task(name).description}")
        return
    raise typer.Exit(run_stage("prepare", config, overrides or []))


_command(
    "export_head",
    "export-head",
    "Get what the PLM owner shares: final norm, LM head, tokenizer. A PLM of one's own is checked.",
)
_command(
    "build_memory",
    "build-memory",
    "Build the external memory on Ray Data, one pass over the pairs. Resumes.",
)
_command(
    "train", "train", "Data owner: train the adapter on the memory with Ray Train (closed form, then joint). Resumes."
)
_command(
    "compare",
    "compare",
    "PEMA beside its peers on the same pairs: PLM alone, few-shot, kNN-LM, PEMA's variants, LoRA with the weights. "
    "Trains and answers for each; what is finished is kept.",
)
_command("generate", "generate", "Answer the test split by Gradual Unrolling.")
_command(
    "evaluate", "evaluate", "Compare PEMA with the PLM alone, few-shot prompting and copying: sBLEU, chrF, NLL over λ."
)
_command("report", "report", "Write the HTML report and print the comparison.")


@app.command("serve")
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
    """Serve an experiment's adapter on this machine until Ctrl-C: OpenAI's API, over whichever PLM `plm` names."""

    def work() -> None:
        from pema_ray.pema.serving.run import serve_experiment, serve_topology

        if topology is not None:
            if config is not None or overrides:
                raise UserError("--topology names a file that says everything; leave out --config and settings.")
            serve_topology(topology)
        else:
            serve_experiment(config, overrides or [], host, port)

    raise typer.Exit(guarded(work))


@app.command("two-owners")
def two_owners(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option("--config", "-c", help="The experiment that the data owner runs.")] = Path(
        "configs/quickstart.yaml"
    ),
    folder: Annotated[Path, typer.Option(help="Gets a folder for each organisation.")] = Path("runs/two_owners"),
) -> None:
    """Two organisations on this machine: a PLM owner behind TLS and a key, and a data owner without weights."""

    def work() -> None:
        from pema_ray.demonstrations.two_owners import run

        run(config, folder, overrides or [])

    raise typer.Exit(guarded(work))


@app.command("serve-key")
def serve_key(
    keys: Annotated[Path, typer.Argument(help="The file of keys; it is made when there is none.")],
    name: Annotated[str, typer.Argument(help="The data owner's name; a known one gets a new key.")],
    rows_per_minute: Annotated[int | None, typer.Option(help="Representations a minute.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens a minute.")] = None,
    sessions: Annotated[int | None, typer.Option(help="Sessions at a time.")] = None,
) -> None:
    """PLM owner: let a data owner in. Prints its key, once; the file keeps a hash."""

    def work() -> None:
        from pema_ray.plm_owner.service.access import Quota, add_client
        from pema_ray.runtime.settings import validate

        asked = {"rows_per_minute": rows_per_minute, "tokens_per_minute": tokens_per_minute, "sessions": sessions}
        typer.echo(add_client(keys, name, validate(Quota, asked, "quota")))

    raise typer.Exit(guarded(work))


@app.command("import-adapter")
def import_adapter(
    prediction: Annotated[Path, typer.Argument(help="The published code's state dict of stage 2 or 3.")],
    new: Annotated[Path, typer.Argument(help="The new adapter's folder.")],
    bundle: Annotated[Path, typer.Option(help="The LM-head bundle of the PLM it was trained for (export-head).")],
    reconstruction: Annotated[
        Path | None, typer.Option(help="The state dict of stage 1; not needed to generate.", show_default="none")
    ] = None,
) -> None:
    """Make an adapter of a checkpoint that the published PEMA code left."""

    def work() -> None:
        from pema_ray.data_owner.adapter.pema import PemaAdapter
        from pema_ray.line import LMHeadBundle
        from pema_ray.runtime.progress import console

        if new.exists():
            raise UserError(f"{new}: is there already. Choose another folder for the new adapter.")
        adapter = PemaAdapter.from_published(prediction, LMHeadBundle.load(bundle).card, reconstruction)
        adapter.save_pretrained(new)
        console.print(f"{new}: rank {adapter.config.rank}, {adapter.config.plm_name}", highlight=False)

    raise typer.Exit(guarded(work))


def main() -> None:
    sys.exit(app())
