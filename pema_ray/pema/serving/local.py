"""Both owners in one cluster, as one Serve application: `serve run pema_ray.pema.serving.local:local`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray.serve import Application

from pema_ray.data_owner.prefixed import PrefixedPLM, TrainedPrefix
from pema_ray.data_owner.service.service import DataOwnerUserConfig, DecoderConfig
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.serving.data_owner import data_owner_deployment
from pema_ray.plm_owner.engine import EngineConfig
from pema_ray.plm_owner.service.application import plm_engine
from pema_ray.plm_owner.service.replicas import Replicas
from pema_ray.runtime.serving.scale import Scale
from pema_ray.runtime.settings import Section, validate


class LocalArgs(Section):
    """Settings of an application with both owners in one cluster."""

    plm: PLMConfig = PLMConfig()
    engine: EngineConfig = EngineConfig()
    decoder: DecoderConfig = DecoderConfig()
    live: DataOwnerUserConfig = DataOwnerUserConfig()
    """Initial adapters and tasks; `user_config` of the deployment `DataOwner` changes them."""
    plm_owner: Scale = Scale()
    data_owner: Scale = Scale()


def local(args: Mapping[str, Any] | None = None) -> Application:
    """The API of the data owner over the replicas of the PLM owner."""
    settings = validate(LocalArgs, dict(args or {}), "args")
    prefix = settings.plm.prefix  # the data owner's
    engine = plm_engine(settings.plm.model_copy(update={"prefix": None}), settings.engine, settings.plm_owner)
    deployment = data_owner_deployment(settings.decoder, settings.data_owner, settings.live)
    connect = Replicas if prefix is None else partial(_behind, TrainedPrefix.from_pretrained(Path(prefix).expanduser()))
    return deployment.bind(connect, settings.decoder.model_dump(), engine)


def _behind(trained: TrainedPrefix, engine: Any) -> PrefixedPLM:
    return PrefixedPLM(Replicas(engine), trained)
