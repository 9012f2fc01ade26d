"""An invalid `user_config` must not end a replica that serves. Knows no deployment."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

logger = logging.getLogger(__name__)


async def refused(change: Awaitable[None], serving: bool) -> str | None:
    """Make a change; returns why it was refused, or None.

    Serve stops a replica whose `reconfigure` raises, starts it again with the same mistake, and gives up. A serving
    replica therefore keeps its configuration and logs the reason; one that does not serve yet raises.

    Args:
        change: must change nothing if it raises.
    """
    try:
        await change
    except Exception as error:
        if not serving:
            raise
        logger.error("Invalid user_config rejected; still serving the previous one: %s", error)
        return str(error)
    return None
