"""Settings of an index."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pema_ray.runtime.settings import Section


class IndexConfig(Section):
    """How a memory is indexed."""

    kind: Literal["exact", "ivf_flat", "ivf_pq", "ivf_pq_fast"] = "exact"
    """`exact` compares with every key; `ivf_flat` with those of the nearest lists; `ivf_pq` with their codes of
    `pq_bytes` bytes; `ivf_pq_fast` with twice as many codes of 4 bits, which registers look up (André et al. 2015)."""
    metric: Literal["inner_product", "l2"] = "inner_product"
    """TRIME's keys are trained for the first; kNN-LM's paper uses squared distance."""
    shards_per_part: int = Field(default=16, ge=1)
    """Shards that are searched together: the unit of building, resuming and sharding."""
    lists: int | None = Field(default=None, ge=1)
    """Inverted lists of `ivf_*`; none: 4 √N, at most one for every 40 keys."""
    pq_bytes: int | None = Field(default=None, ge=1)
    """Of `ivf_pq`, a divisor of the key's size, of `ivf_pq_fast` of half of it; none: the largest up to 64, and with
    4 bits up to a quarter of the key's size."""
    train_rows: int = Field(default=500_000, ge=1)
    """Keys, drawn with `seed`, that lists and codes are learned from."""
    recall_at: int = Field(default=100, ge=1)
    """Neighbours of each key that recall is measured with."""
    actors: int = Field(default=1, ge=1)
    """Processes that add keys."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that one of them requests from Ray."""
