"""Continuous batching: sessions of many callers, one forward pass at a time.

`slots.py` holds the key-value caches, `batcher.py` decides what the next pass computes, `engine.py` runs passes in a
thread of its own and answers callers on the event loop.
"""

from pema_ray.plm_owner.engine.batcher import Batcher, BatchSettings
from pema_ray.plm_owner.engine.engine import Engine

__all__ = ["BatchSettings", "Batcher", "Engine"]
