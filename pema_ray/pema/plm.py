"""Connects a stage to the PLM owner that `plm` names: this process, a Serve application, or an HTTPS service.

Only `plm.name` and `plm.serve` import the PLM owner's code: a data owner needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pema_ray.data_owner.prefixed import PrefixedPLM, TrainedPrefix
from pema_ray.errors import FingerprintMismatch
from pema_ray.line import ModelCard, PLMClient
from pema_ray.line.plm_config import PLMConfig


def connect(config: PLMConfig, card: ModelCard | None = None, engine: Mapping[str, Any] | None = None) -> PLMClient:
    """A client of the PLM owner; models are loaded and connections made by its first call.

    Args:
        card: the PLM that must answer; None accepts any.
        engine: settings (`EngineConfig`) of the engine of a PLM of one's own; the others are configured by their owner.
    """
    if config.prefix is not None:
        trained = TrainedPrefix.from_pretrained(Path(config.prefix).expanduser())
        if card is not None and card.fingerprint != trained.own_fingerprint:
            raise FingerprintMismatch(f"plm.prefix={config.prefix}", trained.own_fingerprint, card.fingerprint)
        alone = None if card is None else replace(card, fingerprint=trained.fingerprint)
        return PrefixedPLM(connect(config.model_copy(update={"prefix": None}), alone, engine), trained)
    fingerprint = config.fingerprint if card is None else card.fingerprint
    if config.url is not None:
        from pema_ray.data_owner.remote import RemotePLM

        return RemotePLM(config, fingerprint)
    if config.serve is not None:
        from pema_ray.plm_owner.service.replicas import Replicas

        return Replicas.of_application(config.serve, fingerprint=fingerprint)
    from pema_ray.plm_owner.engine import EngineConfig, LocalPLM

    return LocalPLM(config, EngineConfig(**(engine or {})), fingerprint=fingerprint)


def connector(
    config: PLMConfig, card: ModelCard | None, cpus: float, engine: Mapping[str, Any] | None = None
) -> Callable[[], PLMClient]:
    """A picklable `connect` for Ray actors.

    Args:
        card: as `connect` takes it.
        cpus: of each actor; a PLM of one's own uses as many threads, unless `plm.threads` is set.
    """
    if config.is_own:
        config = config.model_copy(update={"threads": config.threads or max(1, int(cpus))})
    return partial(connect, with_absolute_files(config), card, dict(engine or {}))


def with_absolute_files(config: PLMConfig) -> PLMConfig:
    """The same for a process in another working folder."""
    files = {name: getattr(config, name) for name in ("key_file", "ca_file", "prefix")}
    absolute = {name: str(Path(file).expanduser().absolute()) for name, file in files.items() if file is not None}
    return config.model_copy(update=absolute)
