"""Trains an adapter under Ray Train: the same loop in every worker, on rows of a memory or of a stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.data_owner.adapter.pema import AdapterConfig
from pema_ray.data_owner.prefixed import OWN_PREFIX
from pema_ray.data_owner.training.batch_samplers import StreamShuffle
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.trainer import AdapterHistory, AdapterTrainer
from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle, ModelCard
from pema_ray.memory import ExternalMemory, MemoryRows, ShardInfo
from pema_ray.memory.build import await_shard
from pema_ray.memory.external_memory import RowsView
from pema_ray.memory.planning import finished_shards
from pema_ray.memory.shards import read_shard
from pema_ray.runtime.hardware import pick_dtype
from pema_ray.runtime.placement import ANYWHERE, PlacementConfig
from pema_ray.training.history import OnPoint
from pema_ray.training.ray_loop import is_first_on_its_node, run_in_worker, run_workers, worker_place

FIRST_STEP = "first_step.json"  # of a streamed training: the number of shards built by then


@dataclass(frozen=True)
class AdapterTrainingJob:
    """Everything a worker needs, as paths that every worker can read (`train_memory` may be `ray://<name>`)."""

    train_memory: Path | str
    dev_memory: Path
    bundle: Path
    run_dir: Path
    adapter: AdapterConfig
    config: TrainConfig
    seed: int = 0
    streamed_rows: int | None = None
    """Rows that `train_memory` will have, if it is built while the job runs."""
    streamed_mean_weight: float = 1.0
    """Their mean weight."""
    placement: PlacementConfig = ANYWHERE
    """Nodes for the workers."""
    prefix: Path | None = None
    """That the memories were built behind; the adapter's folder gets a copy."""


def fit(job: AdapterTrainingJob, on_point: OnPoint = lambda kind, point: None, stream: Any = None) -> AdapterHistory:
    """Train on Ray and leave the adapter in `run_dir/adapter`.

    Args:
        stream: a data set that builds the training memory as it is read (`memory.build.stream_shards`).

    Raises:
        UserError: as a worker raised it.
    """
    streams = {} if stream is None else {"train": stream}
    outcome = run_workers(_train, job, job.run_dir, job.config, on_point, streams, job.placement)
    return AdapterHistory.from_dict(outcome.returned)


def _train(job: AdapterTrainingJob) -> dict[str, Any]:
    """Train in a worker; the leading one writes the adapter and its history."""
    place = worker_place(job.config)
    bundle = LMHeadBundle.load(job.bundle)
    verify = is_first_on_its_node()  # its error ends all workers before the first step
    train = _training_rows(job, bundle.card, verify)
    looks_back = job.adapter.looks_back
    max_rows = None if looks_back else job.config.validation_rows
    dev = ExternalMemory.open(job.dev_memory, bundle.card).view(max_rows=max_rows, prompts=looks_back, verify=verify)
    head = bundle.head.to(pick_dtype(job.config.dtype, place.device))
    name = f"{job.adapter.task or 'adapter'} r={job.adapter.rank}"
    settings = {**job.config.model_dump(mode="json"), "plm": job.adapter.plm_name, "seed": job.seed}

    def count_shards(kind: str, point: Mapping[str, Any]) -> None:
        if kind == "train" and point["step"] == 1 and job.streamed_rows is not None:
            built = len(finished_shards(Path(job.train_memory)))
            (job.run_dir / FIRST_STEP).write_text(json.dumps({"shards": built}))

    trainer = AdapterTrainer(job.adapter, job.config, head, train, dev, job.run_dir, job.seed, place, count_shards)
    history = run_in_worker(trainer, name, settings)
    if place.leads:
        (job.run_dir / "history.json").write_text(json.dumps(history.to_dict()))
        folder = job.run_dir / "adapter"
        trainer.model.save_pretrained(folder, trainer.model.model_card(_summary(history)))
        shutil.rmtree(folder / OWN_PREFIX, ignore_errors=True)
        if job.prefix is not None:
            shutil.copytree(job.prefix, folder / OWN_PREFIX)
    return history.to_dict()


def _training_rows(job: AdapterTrainingJob, card: ModelCard, verify: bool) -> Any:
    if job.streamed_rows is not None:
        return _streamed(job, job.streamed_rows)
    memory = ExternalMemory.open(job.train_memory, card)
    if job.config.shuffle == "window":
        return memory
    return memory.view(max_examples=job.config.max_train_pairs, prompts=job.adapter.looks_back, verify=verify)


def _streamed(job: AdapterTrainingJob, rows: int) -> StreamShuffle:
    """Shards as they are built, read from the files that were just written."""
    folder = Path(job.train_memory)

    def arrivals() -> Iterator[MemoryRows]:
        import ray.train

        stream: Any = ray.train.get_dataset_shard("train")
        for row in stream.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            info = ShardInfo.model_validate_json(row["info"])
            await_shard(folder / info.name, row["node"])
            yield read_shard(folder / info.name, info.sha256).of_targets

    def finished() -> RowsView:
        return RowsView([read_shard(folder / info.name, info.sha256).of_targets for info in finished_shards(folder)])

    return StreamShuffle(rows, job.streamed_mean_weight, arrivals, finished, job.config.batch_size, job.seed)


def _summary(history: AdapterHistory) -> str:
    first, best = history.validation[0], min(history.validation, key=lambda point: point["prediction"])
    return (
        f"Trained on {history.rows:,} rows. Held-out loss on the dev memory, nats per token: "
        f"{first['prediction']:.3f} before the first step, {best['prediction']:.3f} at step {best['step']}.\n\n"
    )
