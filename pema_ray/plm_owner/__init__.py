"""The PLM owner's room: loads a PLM, exports its LM head, extracts context representations, decodes sessions.

Never sees an adapter, a memory or a gold target beyond the tokens it is sent. Imports `line`, not `data_owner`.
"""

from pema_ray.plm_owner.engine import EngineConfig, LocalPLM
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm

__all__ = ["EngineConfig", "LoadedPLM", "LocalPLM", "load_plm"]
