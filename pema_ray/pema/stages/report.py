"""`pema-ray report`: the HTML report, and the table on the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pema_ray.evaluation.report import write_report
from pema_ray.evaluation.results import Evaluation
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.run import Run
from pema_ray.runtime.progress import console


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `report/report.html` and print the comparison."""
    run = Run(config)

    def work() -> dict[str, Any]:
        path = write_report(_load(run), run.path("report", "report.html"))
        return {"path": str(path), "summary": str(path)}

    metrics = run.perform("report", work)
    show(_load(run))
    return metrics


def _load(run: Run) -> Evaluation:
    return Evaluation.model_validate_json(run.path("evaluate", "evaluation.json").read_bytes())


def show(evaluation: Evaluation) -> None:
    """Print the systems and the likelihoods."""
    sweep = evaluation.sweep
    table = Table(title=f"{evaluation.task}, {evaluation.systems[0].examples} held-out pairs, {evaluation.plm_name}")
    for name in ("system", "sBLEU", "chrF", "archaic", "words"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for system in sorted(evaluation.systems, key=lambda s: s.bleu):
        archaic = "–" if system.archaic_share is None else f"{system.archaic_share:.1%}"
        style = "bold" if system.configured else None
        table.add_row(
            system.name, f"{system.bleu:.1f}", f"{system.chrf:.1f}", archaic, f"{system.mean_words:.1f}", style=style
        )
    console.print(table)
    console.print("Bold: this experiment's settings. The other λ were scored on the same pairs.", style="dim")
    console.print(f"sBLEU {evaluation.bleu_signature}")
    likelihoods = ", ".join(f"λ {lam:g}: {nll:.3f}" for lam, nll in zip(sweep.lambdas, sweep.nll, strict=True))
    console.print(f"NLL per held-out token, in nats: PLM {sweep.plm:.3f}, PEMA {sweep.pema:.3f}; {likelihoods}")
