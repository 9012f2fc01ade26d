"""Where training curves go: one small protocol; TensorBoard by default, MLflow and Weights & Biases by name.

The other two write into the run's folder, unless their own environment variables name a server
(`MLFLOW_TRACKING_URI`; `WANDB_API_KEY` and `WANDB_MODE`). A resumed training continues its tracker's run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from pema_ray.errors import UserError
from pema_ray.runtime.environment import allow_mlflow_folders, mlflow_server, wandb_mode

logger = logging.getLogger(__name__)
PROJECT = "pema-ray"
_MISSING = "train.trackers: {kind} is not installed where the workers run: pip install {package}."


class Tracker(Protocol):
    """Receives scalars as they are measured."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in `tensorboard/`; points that a resumed run logs again replace the earlier ones."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make_writer: Any = SummaryWriter
        self._folder, self._writer = str(folder / "tensorboard"), None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make_writer(self._folder, purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflowTracker:
    """A run of the experiment `pema-ray`, in `mlruns/` or on the server of `MLFLOW_TRACKING_URI`."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            raise UserError(_MISSING.format(kind="mlflow", package="mlflow-skinny")) from None
        self._mlflow: Any = mlflow
        if not mlflow_server():
            allow_mlflow_folders()
            mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
        mlflow.set_experiment(PROJECT)
        run_id = folder / "mlflow_run_id"
        run = mlflow.start_run(run_id=run_id.read_text() if run_id.exists() else None, run_name=name)
        if not run_id.exists():
            mlflow.log_params(dict(settings))
            run_id.write_text(run.info.run_id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandbTracker:
    """A run of the project `pema-ray`: offline in `wandb/`, or online where a key is set."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(_MISSING.format(kind="wandb", package="wandb")) from None
        run_id, mode = folder / "wandb_run_id", wandb_mode()
        resumes = mode == "online" and run_id.exists()  # offline, every start writes its own log
        self._run: Any = wandb.init(
            project=PROJECT,
            name=name,
            dir=str(folder),
            mode=cast(Any, mode),
            config=dict(settings),
            id=run_id.read_text() if resumes else None,
            resume="allow" if resumes else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run_id.write_text(self._run.id)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _FailSafe:
    """A tracker whose server may fail: the first failure is logged, and training continues without it."""

    def __init__(self, tracker: Tracker, kind: str) -> None:
        self._tracker, self._kind, self._failed = tracker, kind, False

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, scalars))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # whatever a server's client may raise
            self._failed = True
            logger.warning("train.trackers: %s failed, training continues without it: %s", self._kind, error)


_KINDS: dict[str, type[TensorBoardTracker] | type[MLflowTracker] | type[WandbTracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}


def make_trackers(names: Sequence[str], folder: Path, name: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run.

    Args:
        names: of `tensorboard`, `mlflow`, `wandb`.
        folder: where they keep files.
        name: of the run, as they show it.
        settings: the run's, for search and comparison.

    Raises:
        UserError: a tracker's package is not installed.
    """
    return [_FailSafe(_KINDS[kind](folder, name, settings), kind) for kind in names]
