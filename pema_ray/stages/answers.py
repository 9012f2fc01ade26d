"""Makes generation jobs of a run's pairs, and keeps their answers as JSON Lines. Shared by generate and evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema_ray.cluster import ray_cluster
from pema_ray.config import ExperimentConfig, GenerateConfig, PLMConfig
from pema_ray.data_owner.experts import ExpertSpec
from pema_ray.data_owner.generation import Decoding, Request
from pema_ray.data_owner.ray_generation import Answer, GenerationJob, generate
from pema_ray.data_owner.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.memory.shards import atomic_file
from pema_ray.progress import track
from pema_ray.stages.plm import factory
from pema_ray.stages.run import Run
from pema_ray.tasks import Pair, Prompter
from pema_ray.tasks.postprocess import tidy


def make_job(
    run: Run,
    system: str,
    pairs: Sequence[Pair],
    prompter: Prompter,
    options: GenerateConfig,
    expert: ExpertSpec | None,
) -> GenerationJob:
    """Prompts and limits of one system. A prompt that leaves no room for an answer is refused."""
    alone = UnrollingSchedule(0.0)
    schedule = UnrollingSchedule(options.lambda_max, options.schedule, options.floor) if expert else alone
    requests = [_request(run, pair, prompter, options, schedule) for pair in pairs]
    decoding = Decoding(
        options.decoding, options.temperature, options.top_p, options.beams, options.length_penalty, run.config.seed
    )
    stop = (*run.task.stop, *options.stop)
    return GenerationJob(system, [pair.example_id for pair in pairs], requests, expert, decoding, stop, explain=True)


def expert_of(run: Run, adapter: Path | None = None) -> ExpertSpec:
    """The run's adapter, or another one, with neighbours from its training memory where `generate.knn` wants them."""
    knn = run.config.generate.knn
    memory = run.path("build_memory", "train").resolve() if knn.weight > 0 else None
    adapter = (adapter or run.path("train", "adapter")).resolve()
    return ExpertSpec(adapter, memory, knn, run.config.train.max_train_pairs)


def _request(run: Run, pair: Pair, prompter: Prompter, options: GenerateConfig, schedule: UnrollingSchedule) -> Request:
    prompt = prompter.encode_prompt(pair.source, pair.example_id)
    source = len(run.tokenizer(pair.source, add_special_tokens=False).input_ids)
    card = run.bundle.card
    room = card.max_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"Example {pair.example_id}: its prompt has {len(prompt)} tokens, {card.name} allows {card.max_positions}."
        )
    lengths = {"prompt": len(prompt), "source": source}
    if options.length == "reference":  # an oracle: it knows how long the answer should be
        reference = run.tokenizer(pair.target, add_special_tokens=False).input_ids
        length = len(prompt) + len(reference)
    else:
        length = lengths[options.length] if isinstance(options.length, str) else options.length
    most = min(options.max_new_tokens, int(options.max_new_ratio * source) + 16, room)
    return Request(prompt, most, schedule, max(1, length))


def run_jobs(
    config: ExperimentConfig, run: Run, jobs: Sequence[GenerationJob], title: str, plm: PLMConfig | None = None
) -> dict[str, list[Answer]]:
    """All answers, by system, in the order of their keys' jobs.

    Args:
        plm: another PLM that answers instead of the run's, with the same tokenizer, norm and head.
    """
    options = config.generate
    wanted = sum(len(job.requests) for job in jobs)
    answers: dict[str, dict[int, Answer]] = {job.system: {} for job in jobs}
    with (
        ray_cluster(config.ray, options.cpus_per_actor, options.gpus_per_actor, readers=1),
        track(title, wanted, "answers") as bar,
    ):
        batches = generate(
            jobs,
            factory(plm or config.plm, options.cpus_per_actor, None if plm else run.bundle.card),
            run.path("export_head", "lm_head").resolve(),
            options.batch_size,
            options.actors,
            options.cpus_per_actor,
            options.gpus_per_actor,
            config.plm.device,
        )
        for batch in batches:
            for answer in batch:
                answers[answer.system][answer.key] = answer
            bar.advance(len(batch))
    return {job.system: [answers[job.system][key] for key in job.keys] for job in jobs}


def to_row(run: Run, pair: Pair, answer: Answer) -> dict[str, Any]:
    """What is kept of an answer: texts, why it ended, and per token who decided."""
    generated = answer.generated
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
        "tokens": [{**asdict(trace), "text": run.tokenizer.decode([trace.token])} for trace in generated.trace],
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at U+2028 and U+0085, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
