"""Builders of Serve applications, one for each topology; `serve run pema_ray.serving.applications:local` starts one.

Each takes the `args` of a Serve config file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from pema_ray.config import PLMConfig, Section, validate
from pema_ray.data_owner.remote import RemoteConfig, RemotePLM
from pema_ray.data_owner.serving.api import make_api
from pema_ray.data_owner.serving.service import DataOwner, Live, UnrollerConfig
from pema_ray.metrics import RayMetrics
from pema_ray.plm_owner.access import Access
from pema_ray.plm_owner.api import Limits
from pema_ray.plm_owner.api import make_api as make_public_api
from pema_ray.plm_owner.replicas import Replicas
from pema_ray.plm_owner.service import EngineConfig, PLMEngine
from pema_ray.serving.logs import log_as_json
from pema_ray.serving.swapping import refused

_NEVER = 1_000_000  # of requests; the engine queues by itself and knows when it is full


class Scale(Section):
    """Replicas of a deployment and what each is given."""

    replicas: int = Field(default=1, ge=1)
    """At first, and the fewest where it scales."""
    max_replicas: int | None = Field(default=None, ge=1)
    """More of them as sessions come; none keeps the number."""
    sessions_per_replica: int = Field(default=16, ge=1)
    """What autoscaling aims at."""
    upscale_seconds: float = 10
    """For so long more sessions must live before replicas are added."""
    downscale_seconds: float = 120
    """For so long fewer must live before replicas are taken away."""
    cpus: float = 1
    gpus: float = 0
    resources: dict[str, float] = {}
    """Custom resources of the nodes that may hold a replica."""

    @property
    def actor(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.resources}


class LocalArgs(Section):
    """Of an application with both owners in one cluster."""

    plm: PLMConfig = PLMConfig()
    engine: EngineConfig = EngineConfig()
    unroller: UnrollerConfig = UnrollerConfig()
    live: Live = Live()
    """Adapters, and how they are asked, at first; `user_config` of the deployment `DataOwner` changes them."""
    plm_owner: Scale = Scale()
    data_owner: Scale = Scale()


class PLMOwnerArgs(Section):
    """Of the PLM owner's public service."""

    plm: PLMConfig = PLMConfig()
    engine: EngineConfig = EngineConfig()
    keys: str
    """The file of keys, as `pema-ray serve-key` makes it."""
    audit: str | None = None
    """A file that gets one line a request."""
    limits: Limits = Limits()
    plm_owner: Scale = Scale()
    api_cpus: float = 1


class DataOwnerArgs(Section):
    """Of a data owner's service whose PLM owner is another organisation."""

    line: RemoteConfig
    unroller: UnrollerConfig = UnrollerConfig()
    live: Live = Live()
    """Adapters, and how they are asked, at first; `user_config` of the deployment `DataOwner` changes them."""
    data_owner: Scale = Scale()


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
                policy=AutoscalingPolicy(policy_function="pema_ray.serving.scaling:by_live_sessions"),
            )
        }
    router: Any = "pema_ray.plm_owner.router:HomeRouter"
    deployed: Any = serve.deployment(  # its types do not describe the call form
        name="PLMEngine",
        max_ongoing_requests=_NEVER,
        ray_actor_options=scale.actor,
        request_router_config=RequestRouterConfig(request_router_class=router),
        health_check_period_s=5,
        graceful_shutdown_timeout_s=engine.timeout_seconds,
        user_config={},  # so that `reconfigure` is called, and a replica is ready when its PLM is loaded
        **options,
    )(PLMEngine)
    return deployed.bind(plm.model_copy(update={"threads": threads}).model_dump(), engine.model_dump())


def local(args: Mapping[str, Any] | None = None) -> Application:
    """Both owners in one cluster: the API of the data owner over the replicas of the PLM owner."""
    wanted = validate(LocalArgs, dict(args or {}), "args")
    engine = plm_engine(wanted.plm, wanted.engine, wanted.plm_owner)
    return _data_owner(wanted.unroller, wanted.data_owner, wanted.live).bind(
        Replicas, wanted.unroller.model_dump(), engine
    )


def plm_owner(args: Mapping[str, Any] | None = None) -> Application:
    """The PLM owner's public service, for data owners of other organisations."""
    wanted = validate(PLMOwnerArgs, dict(args or {}), "args")
    engine = plm_engine(wanted.plm, wanted.engine, wanted.plm_owner)

    @serve.deployment(
        name="PLMOwnerAPI",
        num_replicas=1,  # one place that counts quotas
        max_ongoing_requests=_NEVER,
        ray_actor_options={"num_cpus": wanted.api_cpus},
        user_config={},  # so that `reconfigure` is called
        graceful_shutdown_timeout_s=30,
    )
    @serve.ingress()
    class PLMOwnerAPI:
        def __init__(self, engine: Any, keys: str, audit: str | None, limits: Mapping[str, Any]) -> None:
            log_as_json()
            access = Access(Path(keys), None if audit is None else Path(audit))
            self._api = make_public_api(access, Limits(**limits), lambda name: Replicas(engine, name))
            self._sampling: asyncio.Task[None] | None = None

        def __serve_build_asgi_app__(self) -> FastAPI:
            return self._api

        async def reconfigure(self, _: Any) -> None:
            if self._sampling is None:
                state = self._api.state
                metrics = RayMetrics("plm_owner_api")
                self._sampling = asyncio.create_task(metrics.keep_sampling(lambda: (state.counts, {})))

    return PLMOwnerAPI.bind(engine, wanted.keys, wanted.audit, wanted.limits.model_dump())


def data_owner(args: Mapping[str, Any] | None = None) -> Application:
    """The data owner's API, over HTTPS to a PLM owner of another organisation."""
    wanted = validate(DataOwnerArgs, dict(args or {}), "args")
    connect = partial(RemotePLM, wanted.line)
    return _data_owner(wanted.unroller, wanted.data_owner, wanted.live).bind(connect, wanted.unroller.model_dump())


def _data_owner(config: UnrollerConfig, scale: Scale, live: Live) -> Any:
    """The data owner's deployment: its `DataOwner` behind HTTP."""

    @serve.deployment(
        name="DataOwner",
        num_replicas=scale.replicas,
        max_ongoing_requests=_NEVER,
        ray_actor_options=scale.actor,
        user_config=live.model_dump(),
        graceful_shutdown_timeout_s=config.timeout_seconds,
    )
    @serve.ingress()
    class Ingress:
        def __init__(self, connect: Any, unroller: Mapping[str, Any], *line: Any) -> None:
            log_as_json()
            self.owner = DataOwner(lambda: connect(*line), unroller)

        def __serve_build_asgi_app__(self) -> FastAPI:
            return make_api(self.owner)

        async def reconfigure(self, live: Mapping[str, Any]) -> None:
            first = not self.owner.ready
            self.owner.refused = await refused(self.owner.change(live), serving=not first)
            await self.owner.start()
            if first:
                self.owner.tell(RayMetrics("data_owner"))

        def check_health(self) -> None:
            """Raises when nobody answers any more: Serve then replaces the replica."""
            self.owner.check_health()

    return Ingress
