"""`pema-ray trime …`: language models and translation trained with memory, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema_ray.commands.stages import Config, Overrides, add_stages, add_training, guarded_command
from pema_ray.errors import UserError
from pema_ray.runtime.progress import console
from pema_ray.trime.method import TRIME
from pema_ray.trime.translation.method import TRANSLATION

app = typer.Typer(
    help="TRIME: language models trained with memory, and evaluated with local, long and external memory. Stages read "
    "an experiment's YAML file (configs/trime/), and keep their results in its run_dir.",
    no_args_is_help=True,
)
add_training(app, TRIME, "train", "pema_ray.trime.dry_run")
add_stages(app, TRIME, "train")


@app.command("explain")
@guarded_command
def explain(
    text: Annotated[Path, typer.Argument(help="A text file.")],
    page: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    overrides: Overrides = None,
    config: Config = None,
    system: Annotated[str | None, typer.Option(help="Such as ext_knn; none: the best on dev.")] = None,
) -> None:
    """Write a page that shows which memory entries raised the probability of each token of a text."""
    from pema_ray.trime.evaluation.explain import explain_text
    from pema_ray.trime.evaluation.results import TrimeEvaluation
    from pema_ray.trime.run import TrimeRun
    from pema_ray.trime.stages.report import write_page

    run = TrimeRun(TRIME.read("evaluate", config, overrides or []))
    run.metrics("evaluate")
    if not text.is_file():
        raise UserError(f"{text}: no such file.")
    evaluation = TrimeEvaluation.load(run.path("evaluate"))
    write_page(explain_text(run, evaluation, system, text.read_text(encoding="utf-8"), text.name), page)
    console.print(f"{page}", markup=False, highlight=False)


add_training(app, TRANSLATION, "train", "pema_ray.trime.translation.dry_run")
add_stages(app, TRANSLATION, "train")
