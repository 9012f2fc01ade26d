"""The data owner's Serve application, over the PLM owner that `plm` names; it needs none of the PLM owner's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from pema_ray.data_owner.service.api import make_api
from pema_ray.data_owner.service.service import DataOwner, DataOwnerUserConfig, DecoderConfig
from pema_ray.errors import UserError
from pema_ray.line import PLMClient
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.plm import connect
from pema_ray.runtime.metrics import RayMetrics
from pema_ray.runtime.serving.logs import log_as_json
from pema_ray.runtime.serving.scale import UNLIMITED, Scale
from pema_ray.runtime.serving.swapping import refused
from pema_ray.runtime.settings import Section, validate


class DataOwnerArgs(Section):
    """Settings of a data owner's service whose PLM runs elsewhere."""

    plm: PLMConfig
    """The PLM owner's service: `url` with `key_file` and `ca_file`, or `serve` for an application of this cluster."""
    decoder: DecoderConfig = DecoderConfig()
    live: DataOwnerUserConfig = DataOwnerUserConfig()
    """Initial adapters and tasks; `user_config` of the deployment `DataOwner` changes them."""
    data_owner: Scale = Scale()


def data_owner(args: Mapping[str, Any] | None = None) -> Application:
    """The data owner's API, over a PLM owner's service.

    Raises:
        UserError: `plm` names a PLM of one's own.
    """
    settings = validate(DataOwnerArgs, dict(args or {}), "args")
    if settings.plm.is_own:
        raise UserError(
            "args.plm: this application holds no weights: give plm.url or plm.serve. "
            "pema_ray.pema.serving.local:local serves a PLM of one's own."
        )
    deployment = data_owner_deployment(settings.decoder, settings.data_owner, settings.live)
    return deployment.bind(partial(connect, settings.plm), settings.decoder.model_dump())


def data_owner_deployment(config: DecoderConfig, scale: Scale, live: DataOwnerUserConfig) -> Any:
    """The deployment; bind it to a function that connects a client, the decoder's settings, and its arguments."""

    @serve.deployment(
        name="DataOwner",
        num_replicas=scale.replicas,
        max_ongoing_requests=UNLIMITED,
        ray_actor_options=scale.actor,
        user_config=live.model_dump(),
        graceful_shutdown_timeout_s=config.timeout_seconds,
    )
    @serve.ingress()
    class Ingress:
        def __init__(self, connect: Callable[..., PLMClient], decoder: Mapping[str, Any], *plm: Any) -> None:
            log_as_json()
            self.owner = DataOwner(lambda: connect(*plm), decoder)

        def __serve_build_asgi_app__(self) -> FastAPI:
            return make_api(self.owner)

        async def reconfigure(self, live: Mapping[str, Any]) -> None:
            first = not self.owner.ready
            self.owner.rejected = await refused(self.owner.change(live), serving=not first)
            await self.owner.start()
            if first:
                self.owner.use_metrics(RayMetrics("data_owner"))

        def check_health(self) -> None:
            """Raises when the decoder has failed: Serve then replaces the replica."""
            self.owner.check_health()

    return Ingress
