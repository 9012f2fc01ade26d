"""Starts an application on this machine and keeps it until Ctrl-C: the short form of `serve run`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pema_ray.cluster import ray_cluster
from pema_ray.config import ExperimentConfig, load_config
from pema_ray.errors import UserError
from pema_ray.progress import console
from pema_ray.stages.run import Run

_CPUS = 3  # Serve's proxy and the two deployments


def serve_topology(path: Path) -> None:
    """What `serve run <file>` does."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. serve_configs/ has one for each topology.")
    code = subprocess.call([str(Path(sys.executable).with_name("serve")), "run", str(path)])
    if code not in (0, 130):
        raise UserError(f"{path}: could not be served; Ray Serve says why above.")


def serve_experiment(config: Path | None, overrides: Sequence[str], host: str, port: int) -> None:
    """Serve an experiment's PLM and adapter until Ctrl-C.

    Raises:
        UserError: the experiment has no trained adapter, the port is taken, or the application does not come up.
    """
    experiment = load_config(config, overrides)
    args = arguments_of(experiment)
    with ray_cluster(experiment.ray, _CPUS):
        start(args, host, port)
        (name,) = args["live"]["adapters"]
        where = f"http://{host}:{port}"
        console.print(f"OpenAI's API: {where}/v1 (model {name}); to try it: {where}/playground. Ctrl-C ends it.")
        try:
            while True:
                time.sleep(1)
        finally:
            from ray import serve

            serve.shutdown()


def arguments_of(experiment: ExperimentConfig) -> dict:
    """An experiment as `args` of the application `local`.

    Raises:
        UserError: its adapter is not trained yet.
    """
    run = Run(experiment)
    adapter = run.path("train", "adapter").resolve()
    if not adapter.is_dir():
        raise UserError(f"{adapter}: there is no trained adapter. Run the experiment's stages up to train first.")
    g = experiment.generate
    asked = {
        # One text for every source: where examples are chosen for each (task.show: similar), the first ones stand in.
        "text": run.prompter(show="first").text("{source}").rstrip(" "),
        "special_tokens": not experiment.task.chat,
        "stop": list(run.task.stop),
    }
    return {
        "plm": experiment.plm.model_dump(),
        "unroller": {"lambda_max": g.lambda_max, "schedule": g.schedule, "floor": g.floor},
        "live": {"adapters": {run.task.name: str(adapter)}, "prompts": {run.task.name: asked}},
        "plm_owner": {"cpus": experiment.generate.cpus_per_actor, "gpus": experiment.generate.gpus_per_actor},
    }


def start(args: dict, host: str, port: int) -> None:
    """Run the application `local` on the Ray that is connected, and wait until it answers."""
    import socket

    from ray import serve

    from pema_ray.serving.applications import local

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port}: cannot listen there: {error.strerror}. Choose another --port.") from None
    application = local(args)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(application, name="pema")
    except RuntimeError as error:
        raise UserError(f"The application does not come up: {str(error).splitlines()[-1]}") from None
