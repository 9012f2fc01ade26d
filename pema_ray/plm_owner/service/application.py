"""The PLM owner's Serve application: `serve run pema_ray.plm_owner.service.application:plm_owner keys=keys.yaml`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.engine import EngineConfig
from pema_ray.plm_owner.service.access import Access
from pema_ray.plm_owner.service.api import RequestLimits, make_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas
from pema_ray.runtime.metrics import RayMetrics
from pema_ray.runtime.serving.logs import log_as_json
from pema_ray.runtime.serving.scale import UNLIMITED, Scale
from pema_ray.runtime.settings import Section, validate


class PLMOwnerArgs(Section):
    """Arguments of the PLM owner's public service."""

    plm: PLMConfig = PLMConfig()
    engine: EngineConfig = EngineConfig()
    keys: str
    """The file of keys, as `pema-ray serve-key` makes it."""
    adaptation: Literal["none", "prefix"] = "none"
    """`prefix`: data owners may train key-value prefixes; the service computes gradients for them (SECURITY.md)."""
    audit: str | None = None
    """A file that gets one line per request."""
    limits: RequestLimits = RequestLimits()
    plm_owner: Scale = Scale()
    api_cpus: float = 1


def plm_engine(plm: PLMConfig, engine: EngineConfig, scale: Scale) -> Application:
    """The PLM owner's replicas."""
    threads = plm.threads or max(1, int(scale.cpus))
    options: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.max_replicas is not None:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.replicas,
                max_replicas=scale.max_replicas,
                target_ongoing_requests=scale.sessions_per_replica,
                upscale_delay_s=scale.upscale_seconds,
                downscale_delay_s=scale.downscale_seconds,
                policy=AutoscalingPolicy(
                    policy_function="pema_ray.plm_owner.service.autoscaling:ByLoad",
                    policy_kwargs={"tokens_per_replica": scale.tokens_per_replica},
                ),
            )
        }
    router: Any = "pema_ray.plm_owner.service.router:SessionAffinityRouter"
    deployment: Any = serve.deployment(  # its types do not describe the call form
        name="PLMEngine",
        max_ongoing_requests=UNLIMITED,
        ray_actor_options=scale.actor,
        request_router_config=RequestRouterConfig(request_router_class=router),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=engine.timeout_seconds,
        user_config={},  # so that `reconfigure` is called, and a replica is ready when its PLM is loaded
        **options,
    )(PLMEngine)
    return deployment.bind(plm.model_copy(update={"threads": threads}).model_dump(), engine.model_dump())


def plm_owner(args: Mapping[str, Any] | None = None) -> Application:
    """The PLM owner's public service, for data owners of other organisations."""
    settings = validate(PLMOwnerArgs, dict(args or {}), "args")
    refused = {} if settings.adaptation == "prefix" else {"prefix_positions": 0}
    engine = plm_engine(settings.plm, settings.engine.model_copy(update=refused), settings.plm_owner)

    @serve.deployment(
        name="PLMOwnerAPI",
        num_replicas=1,  # one place that counts quotas
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": settings.api_cpus},
        user_config={},  # so that `reconfigure` is called
        graceful_shutdown_timeout_s=30,
    )
    @serve.ingress()
    class PLMOwnerAPI:
        def __init__(self, engine: Any, keys: str, audit: str | None, limits: Mapping[str, Any]) -> None:
            log_as_json()
            access = Access(Path(keys), None if audit is None else Path(audit))
            self._api = make_api(access, RequestLimits(**limits), partial(Replicas, engine))
            self._sampling: asyncio.Task[None] | None = None

        def __serve_build_asgi_app__(self) -> FastAPI:
            return self._api

        async def reconfigure(self, _: Any) -> None:
            if self._sampling is None:
                state = self._api.state
                metrics = RayMetrics("plm_owner_api")
                self._sampling = asyncio.create_task(metrics.keep_sampling(lambda: (state.counts, {})))

    return PLMOwnerAPI.bind(engine, settings.keys, settings.audit, settings.limits.model_dump())
