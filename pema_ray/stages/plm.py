"""Makes the PLM owner that a stage talks to. In process for now; other `ContextSource`s will be chosen here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pema_ray.config import PLMConfig
from pema_ray.line import ContextSource
from pema_ray.plm_owner import InProcessPLM, load_plm


def connect(config: PLMConfig) -> ContextSource:
    """A PLM owner in this process."""
    return InProcessPLM(load_plm(config))


def factory(config: PLMConfig, cpus: float) -> Callable[[], ContextSource]:
    """A picklable maker of PLM owners, for Ray actors that were given `cpus`."""
    threads = config.threads or max(1, int(cpus))
    return partial(connect, config.model_copy(update={"threads": threads}))
