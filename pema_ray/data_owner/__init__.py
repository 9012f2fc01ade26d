"""The data owner's room: adapter, objectives, training, Gradual Unrolling, generation. Imports `line`, not `plm_owner`.

`adapter.py`, `reconstruction.py`, `objectives.py`, `training.py`, `unrolling.py` and most of `decoding/` are
mathematics and know no Ray; `ray_training.py` and `decoding/offline.py` spread them over a cluster.
"""

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix

__all__ = ["AdapterConfig", "PemaAdapter", "UnrollingSchedule", "mix"]
