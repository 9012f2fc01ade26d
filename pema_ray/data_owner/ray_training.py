"""Runs the training loop under Ray Train: one process a worker, DDP between them, the same loop in each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pema_ray.config import TrainConfig
from pema_ray.data_owner.adapter import AdapterConfig
from pema_ray.data_owner.feed import StreamShuffle
from pema_ray.data_owner.strategies import Place
from pema_ray.data_owner.training import CHECKPOINT, History, Point, Trainer
from pema_ray.errors import UserError
from pema_ray.hardware import pick_dtype, set_threads
from pema_ray.line import LMHeadBundle, ModelCard
from pema_ray.memory import ExternalMemory, MemoryRows, ShardInfo
from pema_ray.memory.build import finished_shards
from pema_ray.memory.external_memory import RowsView
from pema_ray.memory.shards import atomic_file, read_shard
from pema_ray.training.tracking import make_trackers

_PROGRESS = "progress.jsonl"
_REFUSAL = "refusal.txt"
_FAILURE = "failure"
_SAME_FAILURES = 2  # after the first, before it is believed
FIRST_STEP = "first_step.json"  # of a streamed training: how much of the memory was there


@dataclass(frozen=True)
class TrainingJob:
    """Everything a worker needs, as paths that every worker can read (`train_memory` may be `ray://<name>`)."""

    train_memory: Path | str
    dev_memory: Path
    bundle: Path
    run_dir: Path
    adapter: AdapterConfig
    config: TrainConfig
    seed: int = 0
    streamed_rows: int | None = None
    """Rows that `train_memory` will have, when it is being built while the job runs."""


def fit(
    job: TrainingJob, on_point: Callable[[str, Point], None] = lambda kind, point: None, stream: Any = None
) -> History:
    """Train on Ray and leave the adapter in `run_dir/adapter`.

    Args:
        stream: a data set that builds the training memory as it is read (`memory.build.stream_shards`).

    Raises:
        UserError: what a worker refused, in its own words.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    c = job.config
    resources = {"CPU": c.cpus_per_worker} | ({"GPU": c.gpus_per_worker} if c.gpus_per_worker else {})

    def run() -> dict[str, Any]:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": job},
            datasets={} if stream is None else {"train": stream},
            scaling_config=ScalingConfig(
                num_workers=c.workers if c.min_workers is None else (c.min_workers, c.workers),
                use_gpu=c.gpus_per_worker > 0,
                resources_per_worker=resources,
            ),
            torch_config=TorchConfig(backend="nccl" if c.gpus_per_worker else "gloo"),
            run_config=RunConfig(
                name="ray_train",
                storage_path=str(job.run_dir.resolve()),
                failure_config=FailureConfig(max_failures=c.max_failures),
            ),
        )
        return cast(dict[str, Any], trainer.fit().return_value)  # what `_worker` returned on rank 0

    job.run_dir.mkdir(parents=True, exist_ok=True)
    refusal = job.run_dir / _REFUSAL
    for told in (refusal, *job.run_dir.glob(f"{_FAILURE}-*.json")):
        told.unlink(missing_ok=True)
    if not c.resume:  # once, here: a worker that dies goes on from the checkpoint all the same
        (job.run_dir / CHECKPOINT).unlink(missing_ok=True)
    with _following(job.run_dir / _PROGRESS, on_point):
        try:
            outcome = _apart(lambda: _past_deaths_at_start(run, c.max_failures))
        except TrainingFailedError as error:
            if refusal.exists():
                raise UserError(refusal.read_text()) from None
            last = str(error).strip().splitlines() or ["unknown"]
            raise UserError(
                f"{job.run_dir}: training was given up after its workers died {c.max_failures + 1} times; the last "
                f"word was: {last[-1].strip()} What was learned is kept: the same command goes on from there."
            ) from error
    if outcome["error"]:
        raise UserError(outcome["error"])
    return History.from_dict(outcome["history"])


def _past_deaths_at_start(run: Callable[[], dict[str, Any]], most: int) -> dict[str, Any]:
    """`run()`, begun anew, at most `most` times, when a worker dies before its first step.

    Ray Train starts workers again that die at work, but takes one that dies while the group is being set up for a
    fault of its own.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    for _ in range(most):
        try:
            return run()
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError):
                raise
    return run()


def _apart(work: Callable[[], Any]) -> Any:
    """Do `work` in a thread: in the main one, Ray Train takes over Ctrl-C, keeps it, and ends the process with 0."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again where it is waited for
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker does; refusals come back as words.

    A worker that is refused among others must not leave them waiting for it: it writes down why and fails, Ray Train
    ends and restarts the group, and all of them find the refusal.
    """
    import ray.train

    job: TrainingJob = settings["job"]
    refusal = job.run_dir / _REFUSAL
    if refusal.exists():
        return {"error": refusal.read_text(), "history": {}}
    try:
        return {"error": "", "history": _train(job).to_dict()}
    except UserError as error:
        if ray.train.get_context().get_world_size() > 1:
            _write(refusal, str(error))
            raise
        return {"error": str(error), "history": {}}
    except Exception as error:
        if said := _said_before(job, error):
            _write(refusal, said)
        raise


def _said_before(job: TrainingJob, error: Exception) -> str:
    """What to tell the user when this worker failed in these words at this very step twice before: it would for ever.

    Failures of files and connections may pass, however often they come in the same words.
    """
    import ray.train
    import torch

    step = _last_step(job.run_dir / _PROGRESS)
    words = f"{type(error).__name__}: {error}"
    record = job.run_dir / f"{_FAILURE}-{ray.train.get_context().get_world_rank()}.json"
    told = json.loads(record.read_text()) if record.exists() else {}
    again = told.get("again", 0) + 1 if (told.get("step"), told.get("error")) == (step, words) else 0
    _write(record, json.dumps({"step": step, "error": words, "again": again}))
    if again < _SAME_FAILURES or isinstance(error, OSError | torch.distributed.DistError):
        return ""
    return f"{job.run_dir}: a training worker fails the same way every time, after step {step}: {words}"


def _last_step(progress: Path) -> int:
    """The last step that the leading worker told of."""
    lines = progress.read_text().split("\n") if progress.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines[:-1]) if line), 0)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def _train(job: TrainingJob) -> History:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    set_threads(max(1, int(job.config.cpus_per_worker)))
    bundle = LMHeadBundle.load(job.bundle)
    train = _training_rows(job, bundle.card)
    looks_back = job.adapter.looks_back
    most = None if looks_back else job.config.validation_rows
    dev = ExternalMemory.open(job.dev_memory, bundle.card).view(max_rows=most, prompts=looks_back)
    place = Place(rank, world, device)
    head = bundle.head.to(pick_dtype(job.config.dtype, device))
    config = job.config.model_copy(update={"resume": True})  # `fit` has seen to what the user wants
    with _reporting(job, leads=rank == 0) as report:
        trainer = Trainer(job.adapter, config, head, train, dev, job.run_dir, job.seed, place, report)
        adapter, history = trainer.run()
    if rank == 0:
        (job.run_dir / "history.json").write_text(json.dumps(history.to_dict()))
        adapter.save_pretrained(job.run_dir / "adapter", adapter.model_card(_figures(history)))
    return history


def _training_rows(job: TrainingJob, card: ModelCard) -> Any:
    if job.streamed_rows is not None:
        return _streamed(job, job.streamed_rows)
    memory = ExternalMemory.open(job.train_memory, card)
    if job.config.shuffle == "window":
        return memory
    return memory.view(max_examples=job.config.max_train_pairs, prompts=job.adapter.looks_back)


def _streamed(job: TrainingJob, rows: int) -> StreamShuffle:
    """Shards as their receipts come in; the rows are read from the files that were just written."""
    folder = Path(job.train_memory)

    def arrivals() -> Iterator[MemoryRows]:
        import ray.train

        stream: Any = ray.train.get_dataset_shard("train")
        for row in stream.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            info = ShardInfo.model_validate_json(row["info"])
            yield read_shard(folder / info.name, info.sha256).of_targets

    def finished() -> RowsView:
        return RowsView([read_shard(folder / info.name, info.sha256).of_targets for info in finished_shards(folder)])

    return StreamShuffle(rows, arrivals, finished, job.config.batch_size, job.seed)


def _figures(history: History) -> str:
    first, best = history.validation[0], min(history.validation, key=lambda point: point.prediction)
    return (
        f"Trained on {history.rows:,} rows. Held-out loss on the dev memory, nats per token: "
        f"{first.prediction:.3f} before the first step, {best.prediction:.3f} at step {best.step}.\n\n"
    )


@contextmanager
def _reporting(job: TrainingJob, leads: bool) -> Iterator[Callable[[str, Point], None]]:
    """Where points go: nowhere but from the leading worker."""
    if not leads:
        yield lambda kind, point: None
        return
    report = _Reporter(job)
    try:
        yield report
    finally:
        report.close()


class _Reporter:
    """Writes each point where the driver and the trackers find it."""

    def __init__(self, job: TrainingJob) -> None:
        name = f"{job.adapter.task or 'adapter'} r={job.adapter.rank}"
        settings = {**job.config.model_dump(mode="json"), "plm": job.adapter.plm_name, "seed": job.seed}
        self._trackers = make_trackers(job.config.trackers, job.run_dir, name, settings)
        self._file = (job.run_dir / _PROGRESS).open("a")
        self._first_step = job.run_dir / FIRST_STEP if job.streamed_rows is not None else None
        self._built = Path(job.train_memory)

    def __call__(self, kind: str, point: Point) -> None:
        self._file.write(json.dumps({"kind": kind, **asdict(point)}) + "\n")
        self._file.flush()
        if kind == "train" and self._first_step and point.step == 1:
            self._first_step.write_text(json.dumps({"shards": len(finished_shards(self._built))}))
        losses = {name: value for name, value in asdict(point).items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(point.step, {f"{kind}/{name}": value for name, value in losses.items()})

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


@contextmanager
def _following(path: Path, on_point: Callable[[str, Point], None]) -> Iterator[None]:
    """Call `on_point` with what the leading worker appends to `path` while the block runs."""
    path.unlink(missing_ok=True)
    done = threading.Event()

    def follow() -> None:
        position = 0
        while True:
            last = done.wait(0.5)
            if path.exists():
                with path.open() as file:
                    file.seek(position)
                    for line in iter(file.readline, ""):
                        if not line.endswith("\n"):
                            break
                        data = json.loads(line)
                        on_point(data.pop("kind"), Point(**data))
                        position = file.tell()
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
