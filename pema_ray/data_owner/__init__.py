"""The data owner's room: adapter, objectives, training, Gradual Unrolling, generation. Imports `line`, not `plm_owner`.

Only `training/ray_training.py`, `decoding/offline.py` and `service/` know Ray.
"""
