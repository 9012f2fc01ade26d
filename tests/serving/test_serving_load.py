"""64 clients stream at once: no error below the limit, 503 or 429 with `retry-after` above it, no leaks."""

from __future__ import annotations

import asyncio
import gc
import time
from functools import partial
from pathlib import Path

import httpx
import msgspec
import openai
import psutil
import pytest
import uvicorn
from serving_kit import DirectHandle

from pema_ray.data_owner.service.api import make_api
from pema_ray.data_owner.service.service import DataOwner
from pema_ray.line import Step, codec
from pema_ray.plm_owner.service.access import Access, Quota, add_client
from pema_ray.plm_owner.service.api import RequestLimits
from pema_ray.plm_owner.service.api import make_api as make_public_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas

CLIENTS = 64
_GROWN = 24 * 2**20  # bytes in the second half of the time; a leaked session alone would be thousands of kilobytes


class Loaded:
    """The data owner's API on a port, over an engine with half as many slots as there are clients."""

    def __init__(self, plm: str, **decoder) -> None:
        config = {"name": plm, "dtype": "float32", "device": "cpu", "threads": 1}
        self.handle = DirectHandle(lambda: PLMEngine(config, {"slots": CLIENTS // 2, "max_tokens": 90}))
        self.owner = DataOwner(lambda: Replicas(self.handle), {"lambda_max": 0.0, "timeout_seconds": 120, **decoder})

    async def __aenter__(self) -> Loaded:
        await self.owner.start()
        self.server = uvicorn.Server(uvicorn.Config(make_api(self.owner), port=0, log_level="critical"))
        self._task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.should_exit = True
        await self._task
        await self.owner.decoder.stop()
        for replica in self.handle.replicas.values():
            await replica.plm.end()

    async def idle(self) -> bool:
        for _ in range(500):
            states = [await replica.state() for replica in self.handle.replicas.values()]
            if not self.owner.decoder.live and not any(state["live_sessions"] for state in states):
                return True
            await asyncio.sleep(0.02)
        return False


async def stream(client: openai.AsyncOpenAI, model: str, number: int) -> str:
    answer = await client.completions.create(
        model=model, prompt=f"Rewrite each verse {number}", max_tokens=20, temperature=0, stream=True
    )
    return "".join([piece.choices[0].text async for piece in answer])


@pytest.mark.parametrize("seconds", [3, pytest.param(180, marks=pytest.mark.slow)])
async def test_64_clients_stream_without_an_error_and_memory_stays(tiny_plm_folder, seconds, record_property):
    async with Loaded(tiny_plm_folder("llama")) as loaded:
        async with openai.AsyncOpenAI(base_url=f"{loaded.url}/v1", api_key="x", max_retries=0, timeout=60) as client:
            model = loaded.owner.card.name
            alone = [await stream(client, model, number) for number in range(4)]
            answers = 0
            resident: list[int] = []
            until = time.monotonic() + seconds

            async def client_loop(number: int) -> None:
                nonlocal answers
                while True:
                    answer = await stream(client, model, number)
                    answers += 1
                    if number < len(alone):
                        assert answer == alone[number]  # whatever else is in the batch
                    if time.monotonic() > until:
                        return

            async def watch() -> None:
                while True:
                    gc.collect()
                    resident.append(psutil.Process().memory_info().rss)
                    await asyncio.sleep(seconds / 20)

            watching = asyncio.create_task(watch())
            await asyncio.gather(*(client_loop(number) for number in range(CLIENTS)))
            watching.cancel()
        record_property("answers", answers)
        record_property("resident MiB", [round(size / 2**20, 1) for size in resident])  # for docs: `--junitxml`
        assert answers >= CLIENTS
        assert await loaded.idle()
        if seconds > 60:
            half = len(resident) // 2
            assert max(resident[-3:]) - max(resident[half - 2 : half + 1]) < _GROWN, resident


async def test_above_the_limit_clients_are_told_when_to_come_again(tiny_plm_folder):
    async with Loaded(tiny_plm_folder("llama"), max_live=16) as loaded:
        async with httpx.AsyncClient(base_url=loaded.url, timeout=60, limits=httpx.Limits(max_connections=200)) as http:
            body = {"model": loaded.owner.card.name, "prompt": "Rewrite", "max_tokens": 60, "temperature": 0}
            requests = [http.post("/v1/completions", json={**body, "stream": i % 2 == 0}) for i in range(CLIENTS)]
            responses = await asyncio.gather(*requests)
        statuses = {answer.status_code for answer in responses}
        assert statuses == {200, 503}
        assert sum(answer.status_code == 200 for answer in responses) >= 16
        for answer in responses:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
                assert "answers are being generated, the limit of this service" in answer.json()["error"]["message"]
            else:
                assert answer.text
        assert await loaded.idle()


async def test_data_owners_over_their_quota_get_429_and_when_to_come_again(tiny_plm_folder, tmp_path: Path):
    config = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(config, {"slots": CLIENTS}))
    keys = {name: add_client(tmp_path / "keys.yaml", name, quota) for name, quota in
            (("small", Quota(sessions=8)), ("large", Quota()))}  # fmt: skip
    api = make_public_api(Access(tmp_path / "keys.yaml"), RequestLimits(), partial(Replicas, handle))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://here", timeout=60) as http:
        fingerprint = (await handle.replicas["r0"].describe()).card.fingerprint

        async def open_(name: str, number: int) -> httpx.Response:
            body = codec.encode_steps([Step(f"{name}{number}", 0, [5, 6, 7])], fingerprint)
            return await http.post("/v1/sessions/step", content=body, headers={"Authorization": f"Bearer {keys[name]}"})

        small, large = await asyncio.gather(
            asyncio.gather(*(open_("small", i) for i in range(CLIENTS // 2))),
            asyncio.gather(*(open_("large", i) for i in range(CLIENTS // 2))),
        )
        assert {answer.status_code for answer in large} == {200}  # one owner's excess does not affect another
        assert sorted(answer.status_code for answer in small) == [200] * 8 + [429] * (CLIENTS // 2 - 8)
        for answer in small:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert "8 sessions" in msgspec.json.decode(answer.content)["error"]["message"]
    await handle.replicas["r0"].plm.end()
