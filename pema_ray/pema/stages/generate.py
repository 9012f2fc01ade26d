"""`pema-ray generate`: answers by Gradual Unrolling over a split of the task, on Ray Data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.run import Run
from pema_ray.pema.stages.answers import make_job, predictor_of, run_jobs, to_row, write_rows


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `generate/answers.jsonl`."""
    run = Run(config)

    def work() -> dict[str, Any]:
        options = config.generate
        predictor = predictor_of(run)
        predictor.check(run.bundle.card)  # fail here, not in every actor
        pairs = run.pairs(options.split)
        job = make_job(run, "pema", pairs, run.prompter(), options, predictor)
        answers = run_jobs(config, run, [job], "answers")["pema"]
        rows = [to_row(run, pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
        write_rows(run.path("generate", "answers.jsonl"), rows)
        finish = Counter(row["finish"] for row in rows)
        tokens = sum(len(answer.answer.tokens) for answer in answers)
        seconds = sum(answer.seconds for answer in answers)
        changed = Counter(rule for row in rows for rule in row["changed_by"])
        return {
            "answers": len(rows),
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "finish": dict(finish),
            "changed_by_postprocessing": {rule: changed[rule] for rule in run.task.postprocess},
            "summary": f"{len(rows)} answers, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s; "
            + ", ".join(f"{count} by {reason}" for reason, count in finish.most_common()),
        }

    return run.perform("generate", work)
