"""`pema-ray evaluate`: PEMA against the PLM alone, few-shot prompting and copying; likelihoods over λ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from pema_ray.data_owner.config import GenerateConfig, ScheduleKind
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.evaluation.results import (
    Evaluation,
    Example,
    LambdaSweep,
    StageFigures,
    SystemScore,
    TokenShare,
    TrainingHistory,
    TrainingPoint,
)
from pema_ray.evaluation.scores import Scorer
from pema_ray.memory import ExternalMemory
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.run import Run
from pema_ray.pema.stages.answers import make_job, predictor_of, read_rows, run_jobs, to_row, write_rows
from pema_ray.pema.stages.likelihood import likelihood_of
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import console
from pema_ray.tasks import Pair


def _plm_name(config: ExperimentConfig, shots: int) -> str:
    """The name of the PLM without an adapter: "alone" if no row of the table shows it examples."""
    if config.plm.prefix is not None:
        return "PLM, trained prefix"
    if shots:
        return f"PLM, {shots} examples shown" if shots > 1 else "PLM, 1 example shown"
    return "PLM, no examples shown" if config.task.shots else "PLM alone"


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `evaluate/evaluation.json` and, in `evaluate/answers.jsonl`, the answers of every system compared."""
    run = Run(config)

    def work() -> dict[str, Any]:
        pairs = run.pairs(config.generate.split)
        ExternalMemory.open(run.path("build_memory", config.generate.split), run.bundle.card)  # fail early
        pema_rows = read_rows(run.path("generate", "answers.jsonl"))
        jobs = _other_systems(run, pairs)
        answers = run_jobs(config, run, jobs, "comparison")
        rows = {
            name: [to_row(run, pair, answer) for pair, answer in zip(pairs, by_pair, strict=True)]
            for name, by_pair in answers.items()
        }
        write_rows(run.path("evaluate", "answers.jsonl"), [row for system_rows in rows.values() for row in system_rows])
        scorer = Scorer([pair.target for pair in pairs], run.task.sacrebleu_language, run.task.archaic_pattern)
        systems = _score(run, scorer, pairs, pema_rows, rows, answers)
        evaluation = Evaluation(
            task=run.task.name,
            description=run.task.description,
            plm_name=run.bundle.card.name,
            fingerprint=run.bundle.card.fingerprint,
            pairs=run.metrics("prepare")["pairs"],
            rows=run.metrics("build_memory")["rows"],
            bleu_signature=scorer.signatures[0],
            chrf_signature=scorer.signatures[1],
            systems=tuple(systems),
            sweep=_sweep(run),
            training=_training(run),
            source_archaic_share=_share(scorer, [pair.source for pair in pairs]),
            reference_archaic_share=_share(scorer, [pair.target for pair in pairs]),
            lambda_curves=_lambda_curves(config.generate),
            examples=_examples(pema_rows, rows[_plm_name(config, config.task.shots)], config.evaluate.sample_pairs),
            stages=tuple(
                StageFigures(stage=name, seconds=run.metrics(name)["seconds"], summary=run.metrics(name)["summary"])
                for name in ("prepare", "export_head", "build_memory", "train", "generate")
            ),
        )
        with atomic_file(run.path("evaluate", "evaluation.json")) as temporary:
            temporary.write_text(evaluation.model_dump_json(indent=1) + "\n")
        return _measure(evaluation)

    return run.perform("evaluate", work)


def _other_systems(run: Run, pairs: Sequence[Pair]) -> list[GenerationJob]:
    """The PLM with the same prompts, with other prompts, and PEMA at other λ."""
    config = run.config
    prompter = run.prompter()
    jobs = [make_job(run, _plm_name(config, config.task.shots), pairs, prompter, config.generate, None)]
    if config.plm.prefix is not None:  # other prompts begin with other tokens than the prefix replaces
        return [*jobs, *_at_other_lambdas(run, pairs)]
    shots = config.evaluate.few_shot
    if shots and shots != config.task.shots:
        name = _plm_name(config, shots)
        try:
            jobs.append(make_job(run, name, pairs, run.prompter(shots), config.generate, None))
        except UserError as error:  # the texts may be too long for these prompts; the other systems still run
            console.print(f"[yellow]'{name}' is left out (evaluate.few_shot): {error}[/]")
    if config.task.shots:
        jobs.append(make_job(run, _plm_name(config, 0), pairs, run.prompter(0), config.generate, None))
    return [*jobs, *_at_other_lambdas(run, pairs)]


def _at_other_lambdas(run: Run, pairs: Sequence[Pair]) -> list[GenerationJob]:
    """PEMA at the constant λ of `evaluate.generate_lambdas`."""
    config, predictor, prompter = run.config, predictor_of(run), run.prompter()
    jobs = []
    for lam in config.evaluate.generate_lambdas:
        options = config.generate.model_copy(update={"lambda_max": lam, "schedule": "constant"})
        if lam > 0 and _name(options) != _name(config.generate):
            jobs.append(make_job(run, _name(options), pairs, prompter, options, predictor))
    return jobs


def _name(options: GenerateConfig) -> str:
    beams = f", {options.beams} beams" if options.decoding == "beam" else ""
    sampled = ", sampled" if options.decoding == "sample" else ""
    neighbours = f", k = {options.knn.neighbours}" if options.knn.weight else ""
    return f"PEMA, λ {options.lambda_max:g} {options.schedule}{beams}{sampled}{neighbours}"


def _score(
    run: Run,
    scorer: Scorer,
    pairs: Sequence[Pair],
    pema_rows: list[dict[str, Any]],
    rows: dict[str, list[dict[str, Any]]],
    answers: dict[str, list[SystemAnswer]],
) -> list[SystemScore]:
    options = run.config.generate

    def scored(name: str, kind: Any, texts: list[str], **fields: Any) -> SystemScore:
        return SystemScore(name=name, kind=kind, examples=len(texts), **asdict(scorer.score(texts)), **fields)

    systems = [scored("copy of the source", "copy", [pair.source for pair in pairs])]
    for name, system_rows in rows.items():
        seconds = sum(answer.seconds for answer in answers[name])
        texts = [row["answer"] for row in system_rows]
        if name == _plm_name(run.config, run.config.task.shots):
            systems.append(scored(name, "plm", texts, lambda_max=0.0, schedule="constant", seconds=seconds))
        elif name.startswith("PLM"):
            systems.append(scored(name, "few_shot", texts, seconds=seconds))
        else:
            lam = next(lam for lam in run.config.evaluate.generate_lambdas if f"λ {lam:g} " in name)
            systems.append(scored(name, "pema", texts, lambda_max=lam, schedule="constant", seconds=seconds))
    texts, seconds = [row["answer"] for row in pema_rows], sum(row["seconds"] for row in pema_rows)
    settings = {"lambda_max": options.lambda_max, "schedule": options.schedule}
    systems.append(scored(_name(options), "pema", texts, seconds=seconds, configured=True, **settings))
    return systems


def _share(scorer: Scorer, texts: list[str]) -> float | None:
    count = scorer.archaic_count(texts)
    return None if count is None else count / len(texts)


def _sweep(run: Run) -> LambdaSweep:
    predictor = predictor_of(run).load(run.bundle.card, run.bundle.head)
    likelihood = likelihood_of(run, run.config.generate.split, predictor)
    lambdas = tuple(sorted({*run.config.evaluate.lambdas, run.config.generate.lambda_max}))
    return LambdaSweep(
        lambdas=lambdas,
        nll=tuple(likelihood.nll(lam) for lam in lambdas),
        plm=likelihood.nll(0.0),
        pema=likelihood.nll(1.0),
        eos_plm=likelihood.nll(0.0, eos=True),
        eos_pema=likelihood.nll(1.0, eos=True),
        rows=len(likelihood.is_eos),
    )


def _training(run: Run) -> TrainingHistory:
    history = json.loads(run.path("train", "history.json").read_text())
    points = {
        kind: tuple(
            TrainingPoint(**{name: point[name] for name in TrainingPoint.model_fields}) for point in history[kind]
        )
        for kind in ("train", "validation")
    }
    c = run.config.train
    return TrainingHistory(
        **points,
        best_step=history["best_step"],
        reconstruction_error=history["reconstruction_error"],
        seconds=history["seconds"] + history["reconstruction_seconds"],
        rank=c.rank,
        space=c.space,
        kappa=c.kappa,
    )


def _lambda_curves(options: GenerateConfig, length: int = 32) -> dict[str, tuple[float, ...]]:
    kinds: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
    floor = min(options.floor, options.lambda_max)  # a constant λ ignores its floor; the other schedules do not
    schedules = {kind: UnrollingSchedule(options.lambda_max, kind, floor) for kind in kinds}
    return {kind: tuple(s.at(t, length) for t in range(length + 1)) for kind, s in schedules.items()}


def _examples(pema_rows: list[dict[str, Any]], plm_rows: list[dict[str, Any]], count: int) -> tuple[Example, ...]:
    return tuple(
        Example(
            example_id=row["example_id"],
            source=row["source"],
            reference=row["reference"],
            plm_alone=plm_row["answer"],
            pema=row["answer"],
            tokens=tuple(
                TokenShare(text=t["text"], lam=t["lam"], p_pema=math.exp(t["log_pema"]), p_plm=math.exp(t["log_plm"]))
                for t in row["tokens"]
            ),
        )
        for row, plm_row in list(zip(pema_rows, plm_rows, strict=True))[:count]
    )


def _measure(evaluation: Evaluation) -> dict[str, Any]:
    by_kind = {kind: [s for s in evaluation.systems if s.kind == kind] for kind in ("plm", "copy", "pema")}
    pema = next(s for s in by_kind["pema"] if s.configured)
    plm, copy, sweep = by_kind["plm"][0], by_kind["copy"][0], evaluation.sweep
    nll = dict(zip(sweep.lambdas, sweep.nll, strict=True))
    configured_lam = pema.lambda_max or 0.0
    return {
        "nll": {"plm": sweep.plm, "pema": sweep.pema, **{f"lambda_{lam:g}": value for lam, value in nll.items()}},
        "bleu": {s.name: round(s.bleu, 2) for s in evaluation.systems},
        "chrf": {s.name: round(s.chrf, 2) for s in evaluation.systems},
        "archaic": {s.name: s.archaic_count for s in evaluation.systems},
        "bleu_signature": evaluation.bleu_signature,
        "summary": f"NLL {sweep.plm:.3f} → {nll[configured_lam]:.3f} nats at λ {configured_lam:g}, "
        f"sBLEU {plm.bleu:.1f} → {pema.bleu:.1f} (copy of the source {copy.bleu:.1f})",
    }
