"""Builds the PlugLM service: `serve run serve_configs/pluglm.yaml`. Replicas follow the memory's folder."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from pema_ray.pluglm.service.service import PlugLMService, PlugLMServiceConfig, make_api
from pema_ray.runtime.settings import Section, validate


class PlugLMArgs(Section):
    """Arguments of the application."""

    service: PlugLMServiceConfig
    replicas: int = Field(default=1, ge=1)
    """Each reads the memory's current version; after an edit by another one it follows within `follow_seconds`."""
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)


def pluglm(args: Mapping[str, Any] | None = None) -> Application:
    """Models and their memory behind HTTP."""
    settings = validate(PlugLMArgs, dict(args or {}), "args")

    @serve.deployment(
        name="PlugLM",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    @serve.ingress()
    class Ingress:
        def __init__(self, service: Mapping[str, Any]) -> None:
            self.service = PlugLMService(service)
            self.following: asyncio.Task[None] | None = None

        def __serve_build_asgi_app__(self) -> FastAPI:
            return make_api(self.service)

        async def check_health(self) -> None:
            if self.following is None or self.following.done():  # started here: it needs an event loop
                self.following = asyncio.get_running_loop().create_task(self.service.follow())

    return Ingress.bind(settings.service.model_dump())
