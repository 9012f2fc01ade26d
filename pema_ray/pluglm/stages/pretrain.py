"""Pre-training from files to a model and its memory: texts and memory by Ray Data, search by Ray actors, the loop by
Ray Train.

    <run_dir>/
      sequences/  validation/     tokenized texts
      pretrain/
        start/                    the model before the first step
        memory/                   the knowledge memory, its versions
        checkpoint.safetensors    model, optimiser, step, memory version
        model/                    the trained model; it reads the memory's current version
        stamp  metrics.json  progress.jsonl  tensorboard/  ray_train/
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from pema_ray.pluglm.config import MemoryActors, ModelSettings, PretrainConfig
from pema_ray.pluglm.learning.memory_trainer import MemoryAccess
from pema_ray.pluglm.learning.pretraining import Pretrainer
from pema_ray.pluglm.learning.text import Sequences, prepare_sequences
from pema_ray.pluglm.memory import refresh as refreshing
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.sharded import ShardedKnowledge, start_shards
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.loading import load_pluglm, load_tokenizer
from pema_ray.pluglm.run import PluglmRun
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.progress import ProgressBar, console, track
from pema_ray.training.history import OnPoint
from pema_ray.training.ray_loop import run_in_worker, run_workers, showing_loss, worker_place

C = TypeVar("C")


@dataclass(frozen=True)
class Job(Generic[C]):
    """The input of a training process."""

    config: C
    run_dir: Path
    shards: Sequence[Any]
    first_version: int
    """Of the memory; 0: no memory."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train, or resume; returns the contents of `metrics.json`.

    Raises:
        UserError: files, settings or checkpoints cannot be used.
    """
    stage_run = PluglmRun(config)
    return stage_run.perform("pretrain", lambda: _train(config, stage_run))


def _train(config: PretrainConfig, stage_run: PluglmRun) -> dict[str, Any]:
    c, m, run_dir = config.train, config.memory, stage_run.path("pretrain")
    workers, readers = c.min_workers or c.workers, math.ceil(m.cpus + 1)
    with ray_cluster(config.ray, c.cpus_per_worker, c.gpus_per_worker, workers, readers=readers):
        stage_run.claim("pretrain", anew=not c.resume)
        if not (run_dir / "start").exists():
            save_model(*new_model(config.model, config.seed), run_dir / "start")
        model, tokenizer = load_pluglm(run_dir / "start")
        prepare_sequences(stage_run.path("sequences"), config.text, tokenizer, c.max_tokens)
        if config.validation is not None:
            prepare_sequences(stage_run.path("validation"), config.validation, tokenizer, c.max_tokens)
        first_version = _memory(run_dir / "memory", config, DocumentEncoder(model, tokenizer, stage_run.folder.name))
        shards = start_shards(run_dir / "memory", m.shards, m.cpus_per_shard)
        with track("pre-training", c.steps) as bar:
            job = Job(config, run_dir, shards, first_version)
            result = run_workers(_work, job, run_dir, c, _showing(bar, c.batch_size)).returned
    return {**result, "summary": _summary(result)}


def _work(job: Job[PretrainConfig]) -> dict[str, Any]:
    """One training process."""
    config, run_dir = job.config, job.run_dir
    place = worker_place(config.train)
    model, tokenizer = load_pluglm(run_dir / "start")
    validation = None if config.validation is None else Sequences.open(run_dir.parent / "validation")
    name = run_dir.parent.name
    trainer = Pretrainer(
        model.to(place.device), tokenizer, config.train, Sequences.open(run_dir.parent / "sequences"), validation,
        memory_access(run_dir / "memory", job.first_version, config.memory, job.shards), run_dir, config.seed, place,
        name=name,
    )  # fmt: skip
    history = run_in_worker(trainer, name, config.train.model_dump(mode="json")).validation
    if place.leads:
        save_model(model, tokenizer, run_dir / "model")
    validated = {"validation_loss": history[-1]["loss"]} if history else {}
    return {"steps": config.train.steps, "memory_version": trainer.version, "history": history, **validated}


def memory_access(
    folder: Path, first_version: int, settings: MemoryActors | None = None, shards: Sequence[Any] = ()
) -> MemoryAccess:
    """A memory in the actors `shards`, or in this process; without settings, this process refreshes it."""
    workers, cpus = (settings.refresh_workers, settings.cpus_per_refresh_worker) if settings else (0, 1)

    def opened(version: int) -> Any:
        return ShardedKnowledge(shards, version) if shards else KnowledgeMemory.open(folder, version).load()

    def refresh(encoder: DocumentEncoder) -> int:
        return refreshing.refresh(KnowledgeMemory.open(folder), encoder, workers, cpus).version

    return MemoryAccess(opened, refresh, lambda keep: KnowledgeMemory.prune(folder, keep), first_version)


def local_access(memory: KnowledgeMemory) -> MemoryAccess:
    """The memory in this process alone, for training without Ray."""
    return memory_access(memory.folder, memory.version)


def new_model(settings: ModelSettings, seed: int) -> tuple[PlugLMForMaskedLM, Any]:
    """The initial (model, tokenizer). Raises `UserError` for a checkpoint or sizes that cannot be used."""
    name = settings.tokenizer or settings.backbone
    assert name is not None
    if settings.backbone and is_pluglm(settings.backbone):
        return load_pluglm(settings.backbone)
    tokenizer = load_tokenizer(name)
    if settings.backbone:
        return PlugLMForMaskedLM.from_backbone(settings.backbone, seed, **settings.memory), tokenizer
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "model_type": "bert"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PlugLMForMaskedLM(PlugLMConfig(backbone=sizes | settings.sizes, **settings.memory))
    return model, tokenizer


def is_pluglm(name: str) -> bool:
    """Whether `name` is a folder with a PlugLM model."""
    path = Path(name) / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") == "pluglm"


def save_model(model: PlugLMForMaskedLM, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer to a folder, completely or not at all."""
    transformers_logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _memory(folder: Path, config: PretrainConfig, encoder: DocumentEncoder) -> int:
    """Build the memory, unless it was built before; returns its first version."""
    m = config.memory
    if refreshing.is_built_from(folder, config.documents, encoder, m.dtype, m.entries_per_segment):
        return next(iter(KnowledgeMemory.open(folder).history())).version
    shutil.rmtree(folder, ignore_errors=True)
    workers, cpus = m.refresh_workers, m.cpus_per_refresh_worker
    return refreshing.build(folder, config.documents, encoder, m.dtype, m.entries_per_segment, workers, cpus).version


def _summary(result: Mapping[str, Any]) -> str:
    history = result["history"]
    losses = f", validation loss {history[0]['loss']:.3f} → {history[-1]['loss']:.3f}" if history else ""
    return f"{result['steps']:,} steps{losses}, memory version {result['memory_version']}"


def _showing(bar: ProgressBar, sequences: int) -> OnPoint:
    advance = showing_loss(bar, sequences)

    def show(kind: str, point: Mapping[str, Any]) -> None:
        advance(kind, point)
        if kind == "validation":
            console.print(f"step {point['step']}: validation loss {point['loss']:.4f}")

    return show
