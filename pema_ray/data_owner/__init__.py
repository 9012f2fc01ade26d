"""The data owner's room: adapter, objectives, training, Gradual Unrolling, generation. Imports `line`, not `plm_owner`.

Only `training/ray_training.py`, `decoding/offline.py` and `service/` know Ray.
"""

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix

__all__ = ["AdapterConfig", "PemaAdapter", "UnrollingSchedule", "mix"]
