"""Runs training processes under Ray Train: restarts, users' errors, repeated failures, curves. Knows no model.

All workers see the run's folder. It holds `progress.jsonl` (points as they happen), `refusal.txt` (a worker's message
to the user), `failure-<rank>.json` (its last failure), `ray_train/` (Ray Train's copies of checkpoints, unless
`storage_path` names another place), and the trackers' files.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.hardware import set_threads
from pema_ray.runtime.placement import ANYWHERE, PlacementConfig, ray_options
from pema_ray.runtime.progress import ProgressBar
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.config import TrainingConfig
from pema_ray.training.history import H, OnPoint
from pema_ray.training.ray_checkpoint import Storage, reporting_checkpoints, restore_checkpoint
from pema_ray.training.strategies import Place
from pema_ray.training.tracking import make_trackers
from pema_ray.training.trainer import Trainer

Settings = TypeVar("Settings")
_PROGRESS = "progress.jsonl"
_REFUSAL = "refusal.txt"
_FAILURE = "failure"
_REPEATED_FAILURES = 2  # after the first: then the program is at fault
_KEPT_CHECKPOINTS = 2  # by Ray Train


@dataclass(frozen=True)
class Outcome:
    """The result of workers that all ended well."""

    returned: dict[str, Any]
    """What `work` returned on rank 0."""
    metrics: Mapping[str, Any]
    """Of the last checkpoint reported to Ray Train; empty without one."""


def run_workers(
    work: Callable[[Settings], dict[str, Any]],
    settings: Settings,
    run_dir: Path,
    config: TrainingConfig,
    on_point: OnPoint = lambda kind, point: None,
    datasets: Mapping[str, Any] | None = None,
    placement: PlacementConfig = ANYWHERE,
) -> Outcome:
    """Run `work(settings)` in every worker; when one dies, restart all.

    `work` resumes from `run_dir / CHECKPOINT` whenever that file exists: `config.resume` has been applied before it
    starts, and a lost file is restored from Ray Train's copy. It gets its place from `worker_place`, and runs its
    trainer with `run_in_worker`.

    Args:
        work: a module-level function, so that workers can import it; it returns JSON values. A `UserError` in it
            reaches the caller unchanged, and no worker is restarted for it.
        settings: all that `work` needs, with paths that every worker can read.
        on_point: called in this process with every point of the leading worker.
        datasets: Ray Data sets by name; workers read their part with `ray.train.get_dataset_shard(name)`.
        placement: nodes of the workers.

    Raises:
        UserError: of a worker; or workers died, or failed in the same way, too often; or `config.storage_path`
            cannot be used.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    c = config
    resources = {"CPU": c.cpus_per_worker} | ({"GPU": c.gpus_per_worker} if c.gpus_per_worker else {})

    def run() -> Any:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "settings": settings, "run_dir": run_dir},
            datasets=dict(datasets or {}),
            scaling_config=ScalingConfig(
                num_workers=c.workers if c.min_workers is None else (c.min_workers, c.workers),
                use_gpu=c.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy=placement.strategy,
                **ray_options(placement),
            ),
            torch_config=TorchConfig(backend="nccl" if c.gpus_per_worker else "gloo"),
            run_config=RunConfig(
                name=storage.name,
                storage_path=storage.path,
                failure_config=FailureConfig(max_failures=c.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
            ),
        )
        return trainer.fit()

    run_dir.mkdir(parents=True, exist_ok=True)
    refusal = run_dir / _REFUSAL
    for record in (refusal, *run_dir.glob(f"{_FAILURE}-*.json")):
        record.unlink(missing_ok=True)
    if not c.resume:  # once, here: restarted workers still resume from the checkpoint
        (run_dir / CHECKPOINT).unlink(missing_ok=True)
    storage = Storage.of(run_dir, c.storage_path)
    storage.prepare(c.resume, (run_dir / CHECKPOINT).exists())
    with _following(run_dir / _PROGRESS, on_point):
        try:
            result = _run_in_thread(lambda: _retry_deaths_at_start(run, c.max_failures))
        except TrainingFailedError as error:
            if refusal.exists():
                raise UserError(refusal.read_text()) from None
            lines = str(error).strip().splitlines() or ["unknown"]
            raise UserError(
                f"{run_dir}: training stopped after its workers died {c.max_failures + 1} times; the last error was: "
                f"{lines[-1].strip()} The checkpoint is kept: the same command resumes from it."
            ) from error
    outcome = result.return_value  # what `_worker` returned on rank 0
    if outcome["error"]:
        raise UserError(outcome["error"])
    return Outcome(outcome["result"], result.metrics or {})


def worker_place(config: TrainingConfig) -> Place:
    """This worker's place; also limits its threads to `config.cpus_per_worker`."""
    import ray.train
    import ray.train.torch

    set_threads(max(1, int(config.cpus_per_worker)))
    context = ray.train.get_context()
    return Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def is_first_on_its_node() -> bool:
    """Whether this worker does what is needed once per node, such as checking files."""
    import ray.train

    return ray.train.get_context().get_local_rank() == 0


def run_in_worker(trainer: Trainer[Any, H], name: str, settings: Mapping[str, Any]) -> H:
    """Run a trainer in this worker.

    The leading worker's points go to the trainer's own `on_point`, then to `run_workers`'s and to the trackers;
    checkpoints are reported to Ray Train.

    Args:
        name, settings: of the run, as trackers show it.
    """
    t, trainers_on_point = trainer, trainer.on_point

    with (
        reporting(t.run_dir, t.place, t.settings, name, settings) as report,
        reporting_checkpoints(t.run_dir, t.place, t.resumed_from) as t.on_saved,
    ):

        def on_point(kind: str, point: Mapping[str, Any]) -> None:
            trainers_on_point(kind, point)
            report(kind, point)

        t.on_point = on_point
        return t.run()


@contextmanager
def reporting(
    run_dir: Path, place: Place, config: TrainingConfig, name: str, settings: Mapping[str, Any]
) -> Iterator[OnPoint]:
    """An `on_point`: the leading worker's points go to `run_workers`'s `on_point` and to the trackers.

    Args:
        name: of the run, as trackers show it.
        settings: the run's, for search and comparison.

    Raises:
        UserError: a tracker's package is not installed.
    """
    if not place.leads:
        yield lambda kind, point: None
        return
    trackers = make_trackers(config.trackers, run_dir, name, settings)
    with (run_dir / _PROGRESS).open("a") as file:

        def on_point(kind: str, point: Mapping[str, Any]) -> None:
            file.write(json.dumps({"kind": kind, **point}) + "\n")
            file.flush()
            scalars = {f"{kind}/{name}": value for name, value in point.items() if name != "step"}
            for tracker in trackers:
                tracker.log(point["step"], scalars)

        try:
            yield on_point
        finally:
            for tracker in trackers:
                tracker.close()


def showing_loss(bar: ProgressBar, rows: int = 0, loss: str = "loss") -> OnPoint:
    """An `on_point` that moves a bar of steps.

    Args:
        rows: of a step; 0: the bar's rate counts steps.
        loss: the key of the figure that is shown beside it.
    """

    def show(kind: str, point: Mapping[str, Any]) -> None:
        if kind == "train":
            bar.advance(point["step"] - bar.done, rows, f"loss {point[loss]:.3f}")

    return show


def _retry_deaths_at_start(run: Callable[[], Any], retries: int) -> Any:
    """`run()`, retried up to `retries` times (-1: any number) when a worker dies before its first step.

    Ray Train restarts workers that die later, but takes a death during the group's set-up for an error of its
    controller.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    for _ in itertools.count() if retries < 0 else range(retries):
        try:
            return run()
        except ControllerError as error:
            if not isinstance(error.controller_failure, RayActorError):
                raise
    return run()


def _run_in_thread(work: Callable[[], Any]) -> Any:
    """Run `work` in a thread: in the main one, Ray Train takes over Ctrl-C and ends the process with exit code 0."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised by `future.result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """Run the work in one worker; users' errors are returned as text.

    Other workers must not wait for one with a user's error: it writes the message to a file and fails, Ray Train
    restarts the group, and all workers return that message.
    """
    import ray.train

    run_dir: Path = job["run_dir"]
    refusal = run_dir / _REFUSAL
    if refusal.exists():
        return {"error": refusal.read_text(), "result": {}}
    try:
        restore_checkpoint(run_dir)
        return {"error": "", "result": job["work"](job["settings"])}
    except UserError as error:
        if ray.train.get_context().get_world_size() > 1:
            _write(refusal, str(error))
            raise
        return {"error": str(error), "result": {}}
    except Exception as error:
        if message := _repeated_failure(run_dir, error):
            _write(refusal, message)
        raise


def _repeated_failure(run_dir: Path, error: Exception) -> str:
    """A message to the user if this worker has failed with the same error at the same step twice before, else "".

    Errors of files and connections may be temporary, however often they repeat.
    """
    import ray.train
    import torch

    step = _last_step(run_dir / _PROGRESS)
    described = f"{type(error).__name__}: {error}"
    record = run_dir / f"{_FAILURE}-{ray.train.get_context().get_world_rank()}.json"
    previous = json.loads(record.read_text()) if record.exists() else {}
    again = previous.get("again", 0) + 1 if (previous.get("step"), previous.get("error")) == (step, described) else 0
    _write(record, json.dumps({"step": step, "error": described, "again": again}))
    if again < _REPEATED_FAILURES or isinstance(error, OSError | torch.distributed.DistError):
        return ""
    return f"{run_dir}: a training worker fails the same way every time, after step {step}: {described}"


def _last_step(progress: Path) -> int:
    """The last step that the leading worker reported."""
    lines = progress.read_text().split("\n") if progress.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines[:-1]) if line), 0)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


@contextmanager
def _following(path: Path, on_point: OnPoint) -> Iterator[None]:
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
                        on_point(data.pop("kind"), data)
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
