"""Connects a stage to Ray: the cluster it was submitted to, the configured address, or a local one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from pema_ray.errors import UserError
from pema_ray.runtime.environment import ray_address, worker_environment
from pema_ray.runtime.placement import (
    ANYWHERE,
    PlacementConfig,
    describe,
    describe_nodes,
    for_tasks,
    matching_nodes,
    matching_resource,
)
from pema_ray.runtime.progress import console
from pema_ray.runtime.settings import Section


class RayConfig(Section):
    """The Ray cluster: an address to join, or the size of a local one."""

    address: str | None = None
    """A cluster to join; none takes `RAY_ADDRESS`, or starts a local cluster for the stage."""
    num_cpus: int = Field(default=4, ge=3)
    """Logical CPUs of a local cluster (Ray Data needs more than the PLM's own)."""
    object_store_mb: int = Field(default=200, ge=80)
    """Object store of a local cluster, MiB."""


@contextmanager
def ray_cluster(
    config: RayConfig,
    cpus: float = 0,
    gpus: float = 0,
    workers: int = 1,
    readers: int = 0,
    placement: PlacementConfig = ANYWHERE,
) -> Iterator[None]:
    """Ray, for the time of the block. A session that is already running is used and left running.

    Args:
        cpus, gpus: of one actor or worker; a cluster that can never provide them is refused at once, unless its
            autoscaler can start such nodes.
        workers: how many must run at the same time (actors may wait for each other, training workers may not).
        readers: CPUs that Ray Data needs beside its actors; without one, both wait for ever.
        placement: nodes that actors and workers are restricted to; only these count.

    Raises:
        UserError: Ray cannot be joined, has no such node, or too little room on its nodes.
    """
    import ray

    starts_ray = not ray.is_initialized()
    if starts_ray:
        _start(config)
    try:
        if _has_nodes(placement):
            _check_room(cpus, gpus, workers, readers, placement)
            _check_strategy(cpus, gpus, workers, placement)
        yield
    finally:
        if starts_ray:
            ray.shutdown()


def _has_nodes(placement: PlacementConfig) -> bool:
    """Whether the cluster has nodes for a placement now; False where only its autoscaler may start some."""
    if matching_nodes(placement):
        return True
    missing = f"placement: no node of the Ray cluster has {describe(placement)}"
    if not _largest_resources():
        raise UserError(
            f"{missing}; its nodes have {describe_nodes(placement)}. Correct the section 'placement', or start such a "
            "node (ray start --labels)."
        )
    console.print(f"{missing} now: waiting for its autoscaler.", highlight=False)
    return False


def _check_room(cpus: float, gpus: float, workers: int, readers: int, placement: PlacementConfig) -> None:
    checks = [("CPU", cpus * workers, readers, for_tasks(placement)), ("GPU", gpus * workers, 0, placement)]
    if placement.accelerator_type:
        checks.append(("CPU", cpus * workers, 0, placement))
    largest = _largest_resources()
    for name, of_workers, of_readers, nodes in checks:
        requested, available = of_workers + of_readers, matching_resource(nodes, name)
        limit = max(available, largest.get(name, 0))
        if requested <= available:
            continue
        who = "One actor asks" if workers == 1 else f"{workers} workers ask"
        who += f" (and {of_readers} reader)" if of_readers else ""
        where = f"the Ray cluster has {available:g}" + (f" on nodes with {describe(nodes)}" if describe(nodes) else "")
        if requested > limit:
            raise UserError(
                f"{who} for {requested:g} {name}, {where} in all"
                + (f" and its autoscaler may make it {limit:g}. " if limit > available else ". ")
                + f"Lower the stage's {name.lower()}s_per_* setting or join a larger cluster (ray.address)."
            )
        console.print(
            f"{who} for {requested:g} {name}, {where} now: waiting for its autoscaler, which may make it {limit:g}.",
            highlight=False,
        )


def _check_strategy(cpus: float, gpus: float, workers: int, placement: PlacementConfig) -> None:
    """Refuse a strict strategy that the cluster's nodes cannot fulfil; Ray Train would wait for ever."""
    if workers == 1 or not placement.strategy.startswith("STRICT") or _largest_resources():
        return
    per_node = workers if placement.strategy == "STRICT_PACK" else 1
    nodes = [
        node
        for node in matching_nodes(placement)
        if node.get("CPU", 0) >= cpus * per_node and node.get("GPU", 0) >= gpus * per_node
    ]
    if len(nodes) * per_node < workers:
        needed = "one node with room for all" if per_node > 1 else "a node each"
        raise UserError(
            f"placement.strategy={placement.strategy}: {workers} workers need {needed}, the Ray cluster has "
            f"{len(nodes)} such. Lower train.workers, or take {placement.strategy.removeprefix('STRICT_')}."
        )


def _largest_resources() -> Mapping[str, float]:
    """Resources that the cluster's autoscaler may grow to; empty without an autoscaler."""
    import ray._private.state  # Ray has no public API for it; Ray Train uses this one too

    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


@contextmanager
def running_cluster(address: str | None = None) -> Iterator[None]:
    """A cluster that outlives this process, for the time of the block; never starts a local one.

    Args:
        address: by default `RAY_ADDRESS`, or the cluster that runs on this machine.
    """
    import ray

    joins = not ray.is_initialized()
    if joins:
        _join(address or ray_address() or "auto")
    try:
        yield
    finally:
        if joins:
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
    import ray.data  # noqa: F401  first: importing it resets the levels

    for name in ("ray", "ray.data", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
    """Restore the SIGTERM handler that Ray replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def data_set(rows: Sequence[Mapping[str, Any]], blocks: int) -> Any:
    """A Ray data set of rows, in so many blocks, which prints nothing of its progress."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.from_items(list(rows), override_num_blocks=blocks)
