"""A PLM owner's public service without Ray, as a process that can be killed. Run by a test: folder, port, PLM."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import uvicorn
from serving_kit import DirectHandle

from pema_ray.plm_owner.service.access import Access
from pema_ray.plm_owner.service.api import RequestLimits, make_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas


async def main(folder: Path, port: int, plm: str) -> None:
    config = {"name": plm, "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(config, {"slots": 16, "max_tokens": 90}))
    access = Access(folder / "keys.yaml", folder / "audit.jsonl")
    api = make_api(access, RequestLimits(), partial(Replicas, handle))
    tls = {"ssl_certfile": str(folder / "server.crt"), "ssl_keyfile": str(folder / "server.key")}
    await uvicorn.Server(uvicorn.Config(api, port=port, log_level="critical", **tls)).serve()


if __name__ == "__main__":
    import asyncio

    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
