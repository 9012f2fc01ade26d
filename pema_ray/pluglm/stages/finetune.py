"""Fine-tuning from files to a model, its scores and its retrieval report: the loop by Ray Train.

<run_dir>/finetune/
  memory/                   a copy of the given memory, optionally with the training examples
  checkpoint.safetensors    model, optimiser, epoch, memory version
  model/                    the best epoch's model; it reads the memory's current version
  validation.jsonl test.jsonl   answers, one example per line
  retrieval.json retrieval.html
  stamp  metrics.json  progress.jsonl  tensorboard/  ray_train/
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.learning.finetuning import Finetuner, TaskExamples
from pema_ray.pluglm.learning.in_task import entries_of
from pema_ray.pluglm.memory import versions
from pema_ray.pluglm.memory.editing import publish_on_current, take_files
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.sharded import start_shards
from pema_ray.pluglm.model.encoder import StaleKeys
from pema_ray.pluglm.model.loading import load_pluglm
from pema_ray.pluglm.retrieval import RetrievalLog
from pema_ray.pluglm.run import PluglmRun
from pema_ray.pluglm.stages.pretrain import Job, memory_access, save_model
from pema_ray.pluglm.tasks import FinetuningTask, make_task
from pema_ray.pluglm.tasks.reading import TaskExample
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import ProgressBar, console, track
from pema_ray.training.history import OnPoint
from pema_ray.training.ray_loop import run_in_worker, run_workers, worker_place


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune and score; returns the contents of `metrics.json`.

    Raises:
        UserError: files, settings, model or memory cannot be used.
        StaleKeys: the memory was made by another encoder than the model's.
    """
    stage_run = PluglmRun(config)
    return stage_run.perform("finetune", lambda: _train(_absolute(config), stage_run))


def _train(config: FinetuneConfig, stage_run: PluglmRun) -> dict[str, Any]:
    c, m, run_dir = config.train, config.memory, stage_run.path("finetune")
    workers, readers = c.min_workers or c.workers, math.ceil(m.cpus + 1)
    with ray_cluster(config.ray, c.cpus_per_worker, c.gpus_per_worker, workers, readers=readers):
        stage_run.claim("finetune", anew=not c.resume)
        first_version = _memory(run_dir / "memory", config)
        shards = start_shards(run_dir / "memory", m.shards, m.cpus_per_shard) if first_version and m.shards else []
        with track("fine-tuning", c.epochs) as bar:
            job = Job(config, run_dir, shards, first_version)
            result = run_workers(_work, job, run_dir, c, _showing(bar)).returned
    if first_version:
        _make_current(run_dir / "memory", result["memory_version"])
    scores = evaluate(config, run_dir)
    return {**result, "scores": scores, "summary": _summary(scores)}


def evaluate(config: FinetuneConfig, run_dir: Path) -> dict[str, dict[str, float]]:
    """Scores of the kept model on validation and test files; writes its answers and retrieval reports."""
    task = _task(config)
    model, tokenizer = load_pluglm(run_dir / "model", task.model_class())
    memory = KnowledgeMemory.open(run_dir / "memory") if (run_dir / "memory").exists() else None
    model.attach(memory.load(model.fingerprint()) if memory else None)
    scores = {}
    for name, path in (("validation", config.data.validation), ("test", config.data.test)):
        if path is None:
            continue
        data = TaskExamples.of(task, task.read(Path(path)), tokenizer, config.train.max_tokens)
        log = RetrievalLog()
        trainer = Finetuner(
            model, tokenizer, task, config.train.model_copy(update={"epochs": 0}), None, data, None, run_dir
        )
        answers = trainer.predict(data, lambda output, examples, log=log: log.add(output.retrieved, examples))
        with atomic_file(run_dir / f"{name}.jsonl") as temporary:
            lines = [json.dumps({"id": key, "answer": answer}, ensure_ascii=False) for key, answer in answers.items()]
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if all(example.label is not None for example in data.examples):
            scores[name] = task.scores(data.examples, answers)
        if memory is not None:
            texts = {number: _shown(example) for number, example in enumerate(data.examples)}
            answers_by_number = {
                number: answers.get(example.id, answers.get(example.group, ""))
                for number, example in enumerate(data.examples)
            }
            log.report(memory, texts, answers_by_number).write(
                run_dir, "retrieval" if name == "validation" else f"retrieval-{name}"
            )
    return scores


def _work(job: Job[FinetuneConfig]) -> dict[str, Any]:
    """One training process."""
    config, run_dir = job.config, job.run_dir
    c, place = config.train, worker_place(config.train)
    task = _task(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    train = memory = fingerprint = None
    if config.data.train is not None and c.epochs:
        train = TaskExamples.of(task, task.read(Path(config.data.train)), tokenizer, c.max_tokens)
    validation = TaskExamples.of(task, task.read(Path(config.data.validation)), tokenizer, c.max_tokens)
    if job.first_version:
        memory = memory_access(run_dir / "memory", job.first_version, config.memory, job.shards)
        if c.frozen:
            fingerprint = versions.read(run_dir / "memory", job.first_version).fingerprint
    model = new_task_model(config, task, fingerprint)
    trainer = Finetuner(
        model.to(place.device), tokenizer, task, c, train, validation, memory, run_dir, config.seed, place,
        write_model=lambda model: save_model(model, tokenizer, run_dir / "model"),
    )  # fmt: skip
    history = run_in_worker(trainer, run_dir.parent.name, c.model_dump(mode="json"))
    return {"memory_version": trainer.best_version, "history": history.validation, "best": trainer.best}


def new_task_model(config: FinetuneConfig, task: FinetuningTask, memory_fingerprint: str | None) -> Any:
    """The pre-trained encoder under the task's head, whose new weights are drawn by the seed.

    Args:
        memory_fingerprint: of the memories it reads, even if training changes its own encoder; None: its own encoder's.
    """
    model_config = AutoConfig.from_pretrained(config.model, **task.head())
    model_config.fix_keys, model_config.fix_values = config.train.fix_keys, config.train.fix_values
    model_config.exclude_own = config.memory.in_task
    model_config.memory_fingerprint = memory_fingerprint
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return task.model_class().from_pretrained(config.model, config=model_config)


def copy_memory(source: KnowledgeMemory, folder: Path) -> KnowledgeMemory:
    """Version 1 of a new memory with the entries of `source`, under their ids."""
    folder.mkdir(parents=True)
    base = source.manifest.model_copy(update={"version": 1, "parent": None, "action": f"copy {source.name}"})
    take_files(folder, base, source.folder, source.manifest)
    versions.publish(folder, base)
    return KnowledgeMemory(folder, base)


def _memory(folder: Path, config: FinetuneConfig) -> int:
    """Make the run's memory, unless it was made before; returns its first version, or 0 without a memory."""
    m = config.memory
    task = _task(config)
    if folder.exists():
        return next(iter(KnowledgeMemory.open(folder).history())).version
    if m.folder is None and not m.in_task:
        return 0
    pretrained, tokenizer = load_pluglm(config.model)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    memory = None
    if m.folder is not None:
        memory = copy_memory(KnowledgeMemory.open(m.folder, m.version), temporary)
        if memory.fingerprint != pretrained.fingerprint():
            raise StaleKeys(memory.name, memory.manifest.encoder_label, pretrained.fingerprint())
    if m.in_task:
        encoder = DocumentEncoder(pretrained, tokenizer, Path(config.model).resolve().name)
        assert config.data.train is not None
        entries = entries_of(task, task.read(Path(config.data.train)), tokenizer, encoder.max_tokens)
        if memory is None:
            memory = KnowledgeMemory.build(temporary, entries, encoder, m.dtype)
        else:
            memory = memory.add(entries, encoder)
    assert memory is not None
    KnowledgeMemory.prune(temporary)
    temporary.rename(folder)
    return memory.version


def _make_current(folder: Path, version: int) -> None:
    """Publish the kept model's version again if a later one is current; a swap refuses another encoder's version."""
    if versions.read(folder).version == version:
        return
    old = versions.read(folder, version)
    names = ("encoder", "fingerprint", "query_size", "hidden_size")
    publish_on_current(
        folder, f"back to version {version}", lambda base: (old.segments, max(base.next_id, old.next_id)), None,
        {name: getattr(old, name) for name in names},
    )  # fmt: skip


def _task(config: FinetuneConfig) -> FinetuningTask:
    """The task, with its labels learned from the training file."""
    task = make_task(config.task)
    if config.data.train is not None:
        task.prepare(task.read(Path(config.data.train)))
    return task


def _absolute(config: FinetuneConfig) -> FinetuneConfig:
    """The same with absolute paths: training processes have other working folders."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).absolute())

    data = {name: absolute(path) for name, path in config.data.model_dump().items()}
    memory = config.memory.model_copy(update={"folder": absolute(config.memory.folder)})
    return config.model_copy(
        update={"model": absolute(config.model), "data": config.data.model_copy(update=data), "memory": memory}
    )


def _shown(example: TaskExample) -> str:
    return f"{example.text} ⏐ {example.pair}" if example.pair else example.text


def _summary(scores: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in figures.items())
        for name, figures in scores.items()
    )


def _showing(bar: ProgressBar) -> OnPoint:
    def show(kind: str, point: Mapping[str, Any]) -> None:
        if kind == "validation":
            bar.advance(1)
            scores = ", ".join(f"{name} {value:.4f}" for name, value in point.items() if name not in ("step", "epoch"))
            console.print(f"epoch {point['epoch']}: {scores}")

    return show
