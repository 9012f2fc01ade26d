"""Connects a stage to Ray: the cluster it was submitted to, the configured address, or a local one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pema_ray.config import RayConfig
from pema_ray.environment import ray_address, worker_environment
from pema_ray.errors import UserError
from pema_ray.progress import console


@contextmanager
def ray_cluster(
    config: RayConfig, cpus: float = 0, gpus: float = 0, workers: int = 1, readers: int = 0
) -> Iterator[None]:
    """Ray, for the time of the block. A session that is already running is used and left running.

    Args:
        cpus, gpus: what one actor or worker will ask for; a cluster that can never give it is refused at once. One
            whose autoscaler can start nodes that do is waited for.
        workers: how many must run at the same time (actors may wait for each other, training workers may not).
        readers: CPUs that Ray Data needs beside its actors; without one, both wait for ever.
    """
    import ray

    mine = not ray.is_initialized()
    if mine:
        _start(config)
    try:
        total, largest = ray.cluster_resources(), _largest_resources()
        for name, asked in (("CPU", cpus * workers + readers), ("GPU", gpus * workers)):
            found, most = total.get(name, 0), max(total.get(name, 0), largest.get(name, 0))
            if asked <= found:
                continue
            who = "One actor asks" if workers == 1 else f"{workers} workers ask"
            who += f" (and {readers} reader)" if readers and name == "CPU" else ""
            if asked > most:
                raise UserError(
                    f"{who} for {asked:g} {name}, the Ray cluster has {found:g} in all"
                    + (f" and its autoscaler may make it {most:g}. " if most > found else ". ")
                    + f"Lower the stage's {name.lower()}s_per_* setting or join a larger cluster (ray.address)."
                )
            console.print(
                f"{who} for {asked:g} {name}, the Ray cluster has {found:g} now: waiting for its autoscaler, which may "
                f"make it {most:g}.", highlight=False,
            )  # fmt: skip
        yield
    finally:
        if mine:
            ray.shutdown()


def _largest_resources() -> Mapping[str, float]:
    """What the cluster may grow to, as its autoscaler is configured; empty where there is none."""
    import ray._private.state  # Ray has no public way to ask; Ray Train asks so too

    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


@contextmanager
def running_cluster(address: str | None = None) -> Iterator[None]:
    """A cluster that outlives this process, for the time of the block: never a local one of its own.

    Args:
        address: by default `RAY_ADDRESS`, or the cluster that runs on this machine.
    """
    import ray

    mine = not ray.is_initialized()
    if mine:
        _join(address or ray_address() or "auto")
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def _join(address: str) -> None:
    import ray

    _quieten()
    try:
        with _sigterm_kept():
            ray.init(address=address, **_common())
    except (ConnectionError, ValueError) as error:
        raise UserError(f"Ray at {address}: cannot connect: {str(error).splitlines()[0]}") from None


def _common() -> dict[str, Any]:
    return {
        "logging_level": logging.WARNING,
        "log_to_driver": False,
        "runtime_env": {"env_vars": worker_environment()},
    }


def _quieten() -> None:
    import ray.data  # noqa: F401  first: importing it sets the levels back

    for noisy in ("ray", "ray.data", "ray.train", "ray._private"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _start(config: RayConfig) -> None:
    import ray

    if address := config.address or ray_address():
        _join(address)
        return
    _quieten()
    with _sigterm_kept():
        ray.init(
            address="local",  # else Ray joins whatever cluster it finds on this machine
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_mb * 2**20,
            include_dashboard=False,
            **_common(),
        )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM over; whoever had it before gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
