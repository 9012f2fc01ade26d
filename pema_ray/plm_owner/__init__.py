"""The PLM owner's room: loads a PLM, exports its LM head, extracts context representations, decodes sessions.

It receives token ids alone: no adapter, memory or gold target. Imports `line`, not `data_owner`.
"""

from pema_ray.plm_owner.engine import EngineConfig, LocalPLM
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm

__all__ = ["EngineConfig", "LoadedPLM", "LocalPLM", "load_plm"]
