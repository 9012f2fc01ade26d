"""The external memory: rows of (context representation, target token) on disk. Imports no owner.

`manifest.py` describes a memory, `shards.py` writes and checks its files, `examples.py` reads and tokenises pairs.
`specification.py`, `planning.py` and `plan.py` divide the work; `build.py` and `shard_worker.py` run it on Ray Data,
`rows.py` queries the PLM, `waits.py` shows what actors wait for. `external_memory.py` reads a memory,
`published.py` keeps it in the object store, `manage.py` verifies, converts, merges and imports memories.
"""

from pema_ray.memory.external_memory import ExternalMemory, MemoryRows
from pema_ray.memory.manifest import Manifest, ShardInfo

__all__ = ["ExternalMemory", "Manifest", "MemoryRows", "ShardInfo"]
