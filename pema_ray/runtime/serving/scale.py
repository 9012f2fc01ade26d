"""Replicas of a deployment, and the resources of each."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pema_ray.runtime.settings import Section

UNLIMITED = 1_000_000  # ongoing requests; the engine and the decoder have queues and limits of their own


class Scale(Section):
    """Replicas of a deployment and what each is given."""

    replicas: int = Field(default=1, ge=1)
    """At the start, and the minimum when autoscaling."""
    max_replicas: int | None = Field(default=None, ge=1)
    """Maximum when autoscaling; none: the number is fixed."""
    sessions_per_replica: int = Field(default=16, ge=1)
    """Target of autoscaling."""
    tokens_per_replica: int = Field(default=32768, ge=1)
    """Waiting tokens of prompts and extractions at which autoscaling adds a replica."""
    upscale_seconds: float = 10
    """Time of higher load before replicas are added."""
    downscale_seconds: float = 120
    """Time of lower load before replicas are removed."""
    cpus: float = 1
    gpus: float = 0
    resources: dict[str, float] = {}
    """Custom resources of the nodes that may hold a replica."""

    @property
    def actor(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.resources}
