"""The line between the owners: everything that crosses it, for both sides.

Down once: the `LMHeadBundle` (final norm, LM head, tokenizer) and the limits of one request. Up: token ids. Down:
context representations, and draft tokens on request. Knows torch tensors, but no model implementation and no Ray.
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
