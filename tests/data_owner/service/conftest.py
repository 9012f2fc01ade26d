"""A service with two adapters, `modern` with a task and `formal` without."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_kit import Service, save_adapter

TASK = {"name": "modern", "template": "Rewrite: {source}\nModern:", "stop": ["\n\n"]}


@pytest.fixture
def adapters(tiny_source, tmp_path: Path) -> dict[str, str]:
    """Folders by name."""
    card, folders = tiny_source("llama").describe().card, {}
    for seed, name in enumerate(("modern", "formal")):
        save_adapter(card, tmp_path / name, seed)
        folders[name] = str(tmp_path / name)
    return folders


@pytest.fixture
async def service(tiny_plm_folder, adapters, anyio_backend):
    live = {"adapters": adapters, "tasks": {"modern": {"task": TASK, "generate": {"lambda_max": 0.7}}}}
    async with Service(tiny_plm_folder("llama"), live) as service:
        yield service
        await service.until_idle()
