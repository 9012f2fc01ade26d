"""Generation jobs for a run's pairs, and their answers as JSON Lines. Shared by generate, evaluate and compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer, generate
from pema_ray.data_owner.decoding.predictor import PredictorSource, PredictorSpec
from pema_ray.data_owner.decoding.request import Token
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.plm import connector
from pema_ray.pema.run import Run
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.tasks import Pair, Prompter
from pema_ray.tasks.postprocess import tidy

_ADAPTER = "adapter"  # any name will do: a job has one adapter
_SPARE_SLOTS = 4  # of one's own engine, beyond the sequences in one batch


def make_job(
    run: Run,
    system: str,
    pairs: Sequence[Pair],
    prompter: Prompter,
    options: GenerateConfig,
    predictor: PredictorSource | None,
    explain: bool = True,
) -> GenerationJob:
    """The requests of one system. A prompt that leaves no room for an answer is refused.

    Args:
        explain: record every token's attribution, as `to_row` needs.
    """
    adapter = None if predictor is None else _ADAPTER
    builder = RequestBuilder(prompter, options, adapter, run.bundle.card.max_positions, run.config.seed)
    requests = [builder.build(pair.source, pair.example_id, pair.target, explain=explain) for pair in pairs]
    return GenerationJob(system, [pair.example_id for pair in pairs], requests, predictor)


def predictor_of(run: Run, adapter: Path | None = None) -> PredictorSpec:
    """The run's adapter, or another one; with neighbours from the training memory if `generate.knn` has a weight."""
    knn = run.config.generate.knn
    memory = run.path("build_memory", "train").resolve() if knn.weight > 0 else None
    adapter = (adapter or run.path("train", "adapter")).resolve()
    return PredictorSpec(adapter, memory, knn, run.config.train.max_train_pairs)


def run_jobs(
    config: ExperimentConfig, run: Run, jobs: Sequence[GenerationJob], title: str, plm: PLMConfig | None = None
) -> dict[str, list[SystemAnswer]]:
    """All answers, by system, in the order of their jobs' keys.

    Args:
        plm: another PLM to use instead of the run's, with the same tokenizer, norm and head.
    """
    options = config.generate
    engine = {"slots": max(options.batch_size, options.beams) + _SPARE_SLOTS, "max_tokens": None}
    card = run.bundle.card if plm is None else None
    plm = plm or config.plm
    connect = connector(plm, card, options.cpus_per_actor, engine)
    answers: dict[str, dict[int, SystemAnswer]] = {job.system: {} for job in jobs}
    with (
        ray_cluster(config.ray, options.cpus_per_actor, options.gpus_per_actor, readers=1, placement=config.placement),
        track(title, sum(len(job.requests) for job in jobs), "answers") as bar,
    ):
        for batch in generate(
            jobs,
            connect,
            run.path("export_head", "lm_head").resolve(),
            options.batch_size,
            options.actors,
            options.cpus_per_actor,
            options.gpus_per_actor,
            config.plm.device,
            share_sessions=not plm.is_own,
            threads=plm.threads,
            placement=config.placement,
        ):
            for answer in batch:
                answers[answer.system][answer.key] = answer
            bar.advance(len(batch))
    return {job.system: [answers[job.system][key] for key in job.keys] for job in jobs}


def to_row(run: Run, pair: Pair, answer: SystemAnswer) -> dict[str, Any]:
    """A row of `answers.jsonl`: texts, why the answer ended, and each token's attribution."""
    generated = answer.answer
    text, changed_by = tidy(generated.text, pair.source, run.task.postprocess)
    return {
        "system": answer.system,
        "example_id": pair.example_id,
        "source": pair.source,
        "reference": pair.target,
        "answer": text,
        "raw": generated.text,
        "changed_by": changed_by,
        "finish": generated.finish,
        "log_prob": generated.log_prob,
        "seconds": answer.seconds,
        "tokens": [_token_row(run, token) for token in generated.tokens],
    }


def _token_row(run: Run, token: Token) -> dict[str, Any]:
    text = "" if token.finish == "eos" else run.tokenizer.token_text(token.id)
    attribution = token.attribution
    assert attribution is not None, "jobs are made with explain"
    return {
        "token": token.id,
        "text": text,
        "lam": attribution.lam,
        "log_pema": attribution.log_pema,
        "log_plm": attribution.log_plm,
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at U+2028 and U+0085, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
