"""The line between the owners: the only things that ever cross it, and the only room both sides import.

Down once: the `LMHeadBundle` (final norm, LM head, tokenizer). Up: token ids. Down: context
representations. Knows torch tensors, but no model implementation and no Ray.
"""

from pema_ray.line.lm_head import LMHead, LMHeadBundle
from pema_ray.line.messages import ExtractBatch, ModelCard
from pema_ray.line.protocol import BlockingPLM, Busy, Description, Limits, PLMClient, SessionLost, Step, Stepped

__all__ = [
    "BlockingPLM",
    "Busy",
    "Description",
    "ExtractBatch",
    "LMHead",
    "LMHeadBundle",
    "Limits",
    "ModelCard",
    "PLMClient",
    "SessionLost",
    "Step",
    "Stepped",
]
