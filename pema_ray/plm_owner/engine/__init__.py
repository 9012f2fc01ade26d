"""Continuous batching: requests of many callers, one forward pass at a time.

`slots.py` holds the key-value caches, `extraction.py` computes representations of whole batches, `batcher.py` chooses
what the next pass computes, `engine.py` runs passes in its own thread and answers callers on the event loop,
`local.py` is the `PLMClient` over it.
"""

from pema_ray.plm_owner.engine.batcher import Batcher
from pema_ray.plm_owner.engine.config import EngineConfig
from pema_ray.plm_owner.engine.engine import Engine
from pema_ray.plm_owner.engine.local import LocalPLM

__all__ = ["Batcher", "Engine", "EngineConfig", "LocalPLM"]
