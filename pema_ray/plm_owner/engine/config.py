"""Settings of the PLM owner's engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pema_ray.runtime.settings import Section


class EngineConfig(Section):
    """How much a PLM owner's engine keeps and computes at once."""

    slots: int = Field(default=32, ge=1)
    """Sessions held at the same time; more wait, and are `Busy` when none becomes free."""
    max_tokens: int | None = Field(default=4096, ge=2)
    """Longest sequence or session; none: what the PLM allows. `slots` times this bounds the cache."""
    pass_tokens: int | None = Field(default=None, ge=1)
    """Positions of one pass over prompts or extraction batches, padding included; smaller passes delay steps less.
    Default: 512 on a CPU, 4096 on a GPU. One longer sequence of an extraction batch is still one pass."""
    share_passes: bool = False
    """Compute small extractions of one data owner together. Faster on a GPU; rounding then depends on what else was
    requested at the same moment, so that a memory which is built again may differ in its last bits."""
    idle_seconds: float = Field(default=30.0, ge=0)
    """A session without steps for so long may lose its slot to another."""
    forget_seconds: float = Field(default=600.0, gt=0)
    """A session without steps for so long is forgotten, whether or not its slot is needed; and so are the prefixes of a
    data owner who has used none for so long, who is then asked to put them again."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """A step or an extraction that has not begun after so long is `Busy`."""
    prefix_positions: int = Field(default=8192, ge=0)
    """Positions of key-value prefixes kept for each data owner; 0: no prefixes, and no gradients."""
    prefix_start: Literal["sent", "kept"] = "sent"
    """Data owners start prefixes from the keys and values of a text. `kept`: those stay here, and what a data owner
    trains is added to them."""
    graph_mib: int = Field(default=2048, ge=0)
    """MiB of graphs kept between representations and their gradient, for at most `forget_seconds`; what is not kept is
    computed again."""
    wire_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """`bfloat16` or `float16` halves the bytes of representations; none keeps the PLM's own."""
