"""Runs training processes under Ray Train: restarts, refusals, the same failure again, curves. Knows no model.

A run's folder is seen by all workers. In it: `progress.jsonl` (points as they happen), `refusal.txt` (a worker's words
to the user), `failure-<rank>.json` (what it failed with last), `ray_train/` (Ray Train's copies of checkpoints, unless
`storage_path` says otherwise), and the trackers' own.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
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
_SAME_FAILURES = 2  # after the first, before it is believed
_KEPT_CHECKPOINTS = 2  # by Ray Train


@dataclass(frozen=True)
class Outcome:
    """What workers leave when all of them have ended well."""

    returned: dict[str, Any]
    """By rank 0's work."""
    metrics: Mapping[str, Any]
    """Of the last checkpoint that was reported to Ray Train; empty where none was."""


def run_workers(
    work: Callable[[Settings], dict[str, Any]],
    settings: Settings,
    run_dir: Path,
    config: TrainingConfig,
    on_point: OnPoint = lambda kind, point: None,
    datasets: Mapping[str, Any] | None = None,
    placement: PlacementConfig = ANYWHERE,
) -> Outcome:
    """Do `work(settings)` in every worker, and again in all of them when one dies.

    `work` goes on from `run_dir / CHECKPOINT` whenever that file is there: what the user wants (`config.resume`) has
    been seen to before it starts, and a file that was lost is put back from what was reported to Ray Train. It asks
    `worker_place` where it is, and runs its trainer by `run_in_worker`.

    Args:
        work: a function of a module, so that workers find it; what it returns can be said in JSON. A `UserError` in
            it reaches the caller in its own words, and no worker is started again for it.
        settings: all that `work` needs, with paths that every worker can read.
        on_point: is called here with every point of the leading worker.
        datasets: Ray Data sets by name; workers read their part with `ray.train.get_dataset_shard(name)`.
        placement: on which nodes the workers run.

    Raises:
        UserError: what a worker refused; or that workers died, or failed in the same way, too often; or that
            `config.storage_path` cannot be used.
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
    if not c.resume:  # once, here: a worker that dies goes on from the checkpoint all the same
        (run_dir / CHECKPOINT).unlink(missing_ok=True)
    storage = Storage.of(run_dir, c.storage_path)
    storage.prepare(c.resume, (run_dir / CHECKPOINT).exists())
    with _following(run_dir / _PROGRESS, on_point):
        try:
            result = _apart(lambda: _past_deaths_at_start(run, c.max_failures))
        except TrainingFailedError as error:
            if refusal.exists():
                raise UserError(refusal.read_text()) from None
            last = str(error).strip().splitlines() or ["unknown"]
            raise UserError(
                f"{run_dir}: training was given up after its workers died {c.max_failures + 1} times; the last "
                f"word was: {last[-1].strip()} What was learned is kept: the same command goes on from there."
            ) from error
    outcome = result.return_value  # what `_worker` returned on rank 0
    if outcome["error"]:
        raise UserError(outcome["error"])
    return Outcome(outcome["result"], result.metrics or {})


def worker_place(config: TrainingConfig) -> Place:
    """Where this worker stands; bounds its threads by the CPUs it asked for."""
    import ray.train
    import ray.train.torch

    set_threads(max(1, int(config.cpus_per_worker)))
    context = ray.train.get_context()
    return Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def is_first_on_its_node() -> bool:
    """Whether this worker does what is needed once a node, such as checking files."""
    import ray.train

    return ray.train.get_context().get_local_rank() == 0


def run_in_worker(trainer: Trainer[Any, H], name: str, settings: Mapping[str, Any]) -> H:
    """Run a trainer in this worker.

    The leading worker's points go where the trainer sent them before, then to `run_workers`'s `on_point` and to the
    trackers; checkpoints are reported to Ray Train.

    Args:
        name, settings: of the run, as trackers show it.
    """
    t, own = trainer, trainer.on_point

    with (
        reporting(t.run_dir, t.place, t.settings, name, settings) as report,
        reporting_checkpoints(t.run_dir, t.place, t.resumed_from) as t.on_saved,
    ):

        def on_point(kind: str, point: Mapping[str, Any]) -> None:
            own(kind, point)
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
        settings: the run's, to be found again by.

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
        rows: of a step; 0: the bar's rate is that of steps.
        loss: the figure of a point that is shown beside it.
    """

    def show(kind: str, point: Mapping[str, Any]) -> None:
        if kind == "train":
            bar.advance(point["step"] - bar.done, rows, f"loss {point[loss]:.3f}")

    return show


def _past_deaths_at_start(run: Callable[[], Any], most: int) -> Any:
    """`run()`, begun anew, at most `most` times (-1: any number), when a worker dies before its first step.

    Ray Train starts workers again that die at work, but takes one that dies while the group is being set up for a
    fault of its own.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    for _ in itertools.count() if most < 0 else range(most):
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


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """What every worker does; refusals come back as words.

    A worker that is refused among others must not leave them waiting for it: it writes down why and fails, Ray Train
    ends and restarts the group, and all of them find the refusal.
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
        if said := _said_before(run_dir, error):
            _write(refusal, said)
        raise


def _said_before(run_dir: Path, error: Exception) -> str:
    """What to tell the user when this worker failed in these words at this very step twice before: it would for ever.

    Failures of files and connections may pass, however often they come in the same words.
    """
    import ray.train
    import torch

    step = _last_step(run_dir / _PROGRESS)
    words = f"{type(error).__name__}: {error}"
    record = run_dir / f"{_FAILURE}-{ray.train.get_context().get_world_rank()}.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    again = before.get("again", 0) + 1 if (before.get("step"), before.get("error")) == (step, words) else 0
    _write(record, json.dumps({"step": step, "error": words, "again": again}))
    if again < _SAME_FAILURES or isinstance(error, OSError | torch.distributed.DistError):
        return ""
    return f"{run_dir}: a training worker fails the same way every time, after step {step}: {words}"


def _last_step(progress: Path) -> int:
    """The last step that the leading worker told of."""
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
