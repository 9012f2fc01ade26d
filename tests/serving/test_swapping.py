"""A mistake in a `user_config` is told and served on, unless nothing is served yet."""

from __future__ import annotations

import pytest

from pema_ray.errors import UserError
from pema_ray.serving.swapping import refused


async def made() -> None:
    return None


async def mistaken() -> None:
    raise UserError("runs/nowhere: no adapter here.")


async def test_who_serves_goes_on_and_says_why(caplog) -> None:
    assert await refused(mistaken(), serving=True) == "runs/nowhere: no adapter here."
    assert "served on: runs/nowhere: no adapter here." in caplog.text
    assert await refused(made(), serving=True) is None


async def test_who_does_not_serve_yet_does_not_begin() -> None:
    with pytest.raises(UserError, match="runs/nowhere"):
        await refused(mistaken(), serving=False)
    assert await refused(made(), serving=False) is None
