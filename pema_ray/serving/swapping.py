"""A mistake in a `user_config` must not end a replica that serves. Knows no deployment."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

logger = logging.getLogger(__name__)


async def refused(change: Awaitable[None], serving: bool) -> str | None:
    """Why a change was refused; None: it was made.

    Serve stops a replica whose `reconfigure` raises, starts it again with the same mistake, and gives up: then nobody
    answers. So whoever serves goes on as before and says why; whoever does not yet serve raises.

    Args:
        change: must change nothing where it raises.
    """
    try:
        await change
    except Exception as error:
        if not serving:
            raise
        logger.error("Invalid user_config rejected; still serving the previous one: %s", error)
        return str(error)
    return None
