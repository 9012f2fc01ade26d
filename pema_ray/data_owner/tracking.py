"""Where training curves go: one small protocol; TensorBoard by default, MLflow and Weights & Biases by name.

The other two keep what they are given in the run's folder, unless their own environment variables name a server
(`MLFLOW_TRACKING_URI`; `WANDB_API_KEY` and `WANDB_MODE`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pema_ray.errors import UserError

PROJECT = "pema-ray"


class Tracker(Protocol):
    """Receives scalars as they are measured."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflowTracker:
    """A run of the experiment `pema-ray`, in `mlruns/` or on the server of `MLFLOW_TRACKING_URI`."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            raise UserError("train.trackers: mlflow is not installed: pip install 'pema-ray[tracking]'.") from None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # needs no database, wants to be asked for
            mlflow.set_tracking_uri((folder / "mlruns").resolve().as_uri())
        mlflow.set_experiment(PROJECT)
        self._mlflow: Any = mlflow
        mlflow.start_run(run_name=name)
        mlflow.log_params(dict(settings))

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
            raise UserError("train.trackers: wandb is not installed: pip install 'pema-ray[tracking]'.") from None
        online = bool(os.environ.get("WANDB_API_KEY"))
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        self._run: Any = wandb.init(
            project=PROJECT,
            name=name,
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


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
        settings: the run's, to be found again by.

    Raises:
        UserError: a tracker's package is not installed.
    """
    return [_KINDS[kind](folder, name, settings) for kind in names]
