"""Builder of the TRIME service: `serve run serve_configs/trime.yaml`. One replica owns the search actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from pema_ray.runtime.serving.swapping import refused
from pema_ray.runtime.settings import Section, validate
from pema_ray.trime.service.service import TrimeService, TrimeServiceConfig, TrimeUserConfig, make_api


class TrimeArgs(Section):
    """Arguments of the application."""

    service: TrimeServiceConfig
    live: TrimeUserConfig = TrimeUserConfig()
    """Datastores at first; `user_config` of the deployment `Trime` changes them."""
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)


def trime(args: Mapping[str, Any] | None = None) -> Application:
    """A TRIME model with its datastores behind HTTP."""
    settings = validate(TrimeArgs, dict(args or {}), "args")

    @serve.deployment(
        name="Trime",
        num_replicas=1,  # it owns the actors of its datastores
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        user_config=settings.live.model_dump(),
    )
    @serve.ingress()
    class Ingress:
        def __init__(self, service: Mapping[str, Any]) -> None:
            self.service = TrimeService(service)
            self._serving = False

        def __serve_build_asgi_app__(self) -> FastAPI:
            return make_api(self.service)

        async def reconfigure(self, live: Mapping[str, Any]) -> None:
            self.service.refused = await refused(self.service.change(live), self._serving)
            self._serving = True

    return Ingress.bind(settings.service.model_dump())
