"""Makes the PLM owner that a stage talks to. In process for now; other `ContextSource`s will be chosen here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pema_ray.config import PLMConfig
from pema_ray.errors import FingerprintMismatch
from pema_ray.line import ContextSource, ModelCard
from pema_ray.plm_owner import InProcessPLM, load_plm


def connect(config: PLMConfig) -> ContextSource:
    """A PLM owner in this process."""
    return InProcessPLM(load_plm(config))


def factory(config: PLMConfig, cpus: float, card: ModelCard | None) -> Callable[[], ContextSource]:
    """A picklable maker of PLM owners, for Ray actors that were given `cpus`.

    Args:
        card: the PLM that each must turn out to be; None takes any.
    """
    threads = config.threads or max(1, int(cpus))
    return partial(_connect_to, config.model_copy(update={"threads": threads}), card)


def _connect_to(config: PLMConfig, card: ModelCard | None) -> ContextSource:
    source = connect(config)
    if card is None:
        return source
    found = source.describe()
    if found.fingerprint != card.fingerprint:
        raise FingerprintMismatch(f"plm.name={config.name}", found.label, card.label)
    return source
