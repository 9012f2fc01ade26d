"""A mistake in a `user_config` is logged and the previous one stays in use, unless there is none."""

from __future__ import annotations

import pytest

from pema_ray.errors import UserError
from pema_ray.runtime.serving.swapping import refused


async def made() -> None:
    return None


async def mistaken() -> None:
    raise UserError("runs/nowhere: no adapter here.")


async def test_a_serving_replica_keeps_its_configuration_and_says_why(caplog) -> None:
    assert await refused(mistaken(), serving=True) == "runs/nowhere: no adapter here."
    assert "still serving the previous one: runs/nowhere: no adapter here." in caplog.text
    assert await refused(made(), serving=True) is None


async def test_a_replica_that_does_not_serve_yet_raises() -> None:
    with pytest.raises(UserError, match="runs/nowhere"):
        await refused(mistaken(), serving=False)
    assert await refused(made(), serving=False) is None
