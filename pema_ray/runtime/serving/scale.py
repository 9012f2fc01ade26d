"""How many replicas a deployment has, and what each is given."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pema_ray.runtime.settings import Section

UNLIMITED = 1_000_000  # ongoing requests; the engine and the decoder queue by themselves and know when they are full


class Scale(Section):
    """Replicas of a deployment and what each is given."""

    replicas: int = Field(default=1, ge=1)
    """At first, and the fewest where it scales."""
    max_replicas: int | None = Field(default=None, ge=1)
    """More of them as sessions come; none keeps the number."""
    sessions_per_replica: int = Field(default=16, ge=1)
    """What autoscaling aims at."""
    tokens_per_replica: int = Field(default=32768, ge=1)
    """Waiting tokens of prompts and extractions at which autoscaling adds a replica."""
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
