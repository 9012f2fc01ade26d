"""The external memory: rows of (context representation, target token) on disk. Imports no owner.

`manifest.py` says what a memory is, `shards.py` writes and checks its files, `examples.py` reads and tokenises pairs.
`specification.py`, `planning.py` and `plan.py` decide who computes what; `build.py` and `shard_worker.py` do it on Ray
Data, `rows.py` asks the PLM, `waits.py` shows what it waits for. `external_memory.py` reads a memory back,
`published.py` keeps it in the object store, `manage.py` makes new memories of old ones.
"""

from pema_ray.memory.external_memory import ExternalMemory, MemoryRows
from pema_ray.memory.manifest import Manifest, ShardInfo

__all__ = ["ExternalMemory", "Manifest", "MemoryRows", "ShardInfo"]
