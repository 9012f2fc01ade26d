"""The external memory: rows of (context representation, target token) on disk. Imports no owner.

`manifest.py` says what a memory is, `shards.py` writes and checks its files, `plan.py` decides who computes
what, `build.py` runs the plan on Ray Data, `external_memory.py` reads it back,
`published.py` keeps it in the object store, `manage.py` makes new memories of old ones.
"""

from pema_ray.memory.external_memory import ExternalMemory, MemoryRows
from pema_ray.memory.manifest import Manifest, ShardInfo

__all__ = ["ExternalMemory", "Manifest", "MemoryRows", "ShardInfo"]
