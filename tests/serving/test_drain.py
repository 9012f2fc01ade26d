"""The PLM owner's public service is redeployed under load: running steps finish, new requests get an answer or 503."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from ray import serve
from test_serving_cluster import free_port

from pema_ray.errors import UserError
from pema_ray.line import Step, Stepped, codec
from pema_ray.plm_owner.service.access import Quota, add_client
from pema_ray.plm_owner.service.application import plm_owner

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


async def test_a_step_that_is_under_way_is_finished_while_the_service_is_replaced(
    ray_cluster, tiny_plm_folder, tmp_path
):
    key = add_client(tmp_path / "keys.yaml", "them", Quota())
    args: dict[str, Any] = {
        "plm": {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu"},
        "engine": {"slots": 1, "max_tokens": 90, "idle_seconds": 6},
        "keys": str(tmp_path / "keys.yaml"),
        "plm_owner": {"cpus": 0.1},
        "api_cpus": 0.1,
    }
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        await asyncio.to_thread(serve.run, plm_owner(args), name="plm")
        handle = serve.get_deployment_handle("PLMEngine", "plm")
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as http:

            async def step(session: str) -> httpx.Response:
                frame = codec.encode_steps([Step(session, 0, [5, 6])], fingerprint)
                return await http.post("/v1/sessions/step", content=frame)

            def stepped(response: httpx.Response) -> bool:
                assert response.status_code == 200, response.text
                return isinstance(codec.decode_stepped(response.content, UserError)[0], Stepped)

            fingerprint = (await http.get("/v1/model")).json()["fingerprint"]
            assert stepped(await step("holds the only slot"))
            waiting = asyncio.create_task(step("waits for it"))  # until the other is idle: six seconds
            until = time.monotonic() + 5
            while not (await handle.state.remote())["waiting_steps"]:
                assert time.monotonic() < until and not waiting.done()
                await asyncio.sleep(0.02)
            renewed = {**args, "limits": {"max_steps": 77}}
            deploying = asyncio.create_task(asyncio.to_thread(serve.run, plm_owner(renewed), name="plm"))
            statuses: Counter[int] = Counter()
            while not (deploying.done() and waiting.done()):
                response = await http.get("/v1/model")
                statuses[response.status_code] += 1
                if response.status_code != 200:
                    assert response.status_code == 503, response.text
                    assert int(response.headers["Retry-After"]) >= 1
                await asyncio.sleep(0.05)
            assert stepped(await waiting)
            await deploying
            assert statuses[200]
            assert (await http.get("/v1/model")).json()["limits"]["max_steps"] == 77
            assert stepped(await step("of the new one"))
    finally:
        serve.shutdown()
