"""Starts an application on this machine and keeps it until Ctrl-C: the short form of `serve run`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_ray.data_owner.config import UnrollingConfig
from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.config import ExperimentConfig, load_config
from pema_ray.pema.plm import with_absolute_files
from pema_ray.pema.run import Run
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.progress import console
from pema_ray.tasks.shots import first_shots

if TYPE_CHECKING:
    from ray.serve import Application

_CPUS = 3  # Serve's proxy and the two deployments


def serve_topology(path: Path) -> None:
    """Run `serve run <file>`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. serve_configs/ has one for each topology.")
    code = subprocess.call([str(Path(sys.executable).with_name("serve")), "run", str(path)])
    if code not in (0, 130):
        raise UserError(f"{path}: could not be served; see Ray Serve's error above.")


def serve_experiment(config: Path | None, overrides: Sequence[str], host: str, port: int) -> None:
    """Serve an experiment's PLM and adapter until Ctrl-C.

    Raises:
        UserError: the experiment has no trained adapter, the port is taken, or the application does not start.
    """
    experiment = load_config(config, overrides)
    args = arguments_of(experiment)
    with ray_cluster(experiment.ray, _CPUS):
        start(args, host, port)
        (name,) = args["live"]["adapters"]
        url = f"http://{host}:{port}"
        console.print(f"OpenAI's API: {url}/v1 (model {name}); playground: {url}/playground. Ctrl-C stops it.")
        try:
            while True:
                time.sleep(1)
        finally:
            from ray import serve

            serve.shutdown()


def arguments_of(experiment: ExperimentConfig) -> dict[str, Any]:
    """An experiment as `args` of its application; `generate` and the task belong to the adapter.

    Raises:
        UserError: its adapter is not trained yet.
    """
    run = Run(experiment)
    adapter = run.path("train", "adapter").resolve()
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no trained adapter. Run the experiment's stages up to train first.")
    generate, task = experiment.generate, experiment.task
    knn = generate.knn.weight > 0
    task_args: dict[str, Any] = {
        "task": run.task.model_dump(),
        "chat": task.chat,
        "chat_template_kwargs": task.chat_template_kwargs,
        "generate": generate.model_dump(),
        "memory": str(run.path("build_memory", "train").resolve()) if knn else None,
        "max_examples": experiment.train.max_train_pairs,
    }
    if task.shots and task.show == "similar":
        task_args |= {"similar": str(run.path("prepare", "train.parquet").resolve()), "shots": task.shots}
    elif task.shots:
        examples = first_shots(run.pairs("train"), task.shots)
        task_args["shown"] = [{"source": pair.source, "target": pair.target} for pair in examples]
    decoder = generate.model_dump(include=set(UnrollingConfig.model_fields))
    arguments: dict[str, Any] = {
        "plm": with_absolute_files(experiment.plm).model_dump(),
        "decoder": {**decoder, "device": experiment.plm.device},
        "live": {"adapters": {run.task.name: str(adapter)}, "tasks": {run.task.name: task_args}},
    }
    if experiment.plm.is_own:
        arguments["plm_owner"] = {"cpus": generate.cpus_per_actor, "gpus": generate.gpus_per_actor}
    return arguments


def application_of(args: dict[str, Any]) -> Application:
    """Both owners for a PLM of one's own, else the data owner alone."""
    if PLMConfig(**args["plm"]).is_own:
        from pema_ray.pema.serving.local import local

        return local(args)
    from pema_ray.pema.serving.data_owner import data_owner

    return data_owner(args)


def start(args: dict[str, Any], host: str, port: int) -> None:
    """Run the application on the connected Ray cluster, and wait until it answers."""
    import socket

    from ray import serve

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port}: cannot listen there: {error.strerror}. Choose another --port.") from None
    application = application_of(args)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application, name="pema")
    except RuntimeError as error:
        raise UserError(f"The application does not start: {str(error).splitlines()[-1]}") from None
