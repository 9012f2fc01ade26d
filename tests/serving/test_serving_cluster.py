"""Both owners under Ray Serve: replicas die, the application is deployed anew, and no answer changes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time

import openai
import psutil
import pytest
import ray
import torch
from ray import serve

from pema_ray.data_owner.adapter import AdapterConfig, PemaAdapter
from pema_ray.data_owner.generation import Decoding, Generator, Request
from pema_ray.data_owner.unrolling import UnrollingSchedule
from pema_ray.serving.applications import local

pytestmark = pytest.mark.cluster
MOST = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def adapter(tiny_source, tmp_path_factory):
    card = tiny_source("llama").describe()
    torch.manual_seed(3)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint, residual=True))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("adapter")
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def application(ray_cluster, tiny_plm_folder, adapter):
    plm = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu"}
    args = {
        "plm": plm,
        "engine": {"slots": 8, "max_tokens": 90},
        "unroller": {
            "lambda_max": 0.7,
            "timeout_seconds": 60,
            "dtype": "float32",
        },  # as exact as what it is compared with
        "live": {"adapters": {"mine": str(adapter)}},
        "plm_owner": {"replicas": 2, "cpus": 0.1},
        "data_owner": {"cpus": 0.1},
    }
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(local(args), name="pema")
    yield f"http://127.0.0.1:{port}/v1", args
    serve.shutdown()


@pytest.fixture(scope="module")
def expected(tiny_source, adapter):
    """What the offline generator answers."""
    source = tiny_source("llama")
    bundle = source.lm_head()
    tokenizer = bundle.tokenizer()
    expert = PemaAdapter.from_pretrained(adapter, bundle.card)
    generator = Generator(
        source,
        bundle.head,
        expert,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        bundle.card.eos_token_ids,
    )

    def answer(prompt: str) -> str:
        ids = tokenizer(prompt).input_ids
        (found,) = generator.generate([Request(ids, MOST, UnrollingSchedule(0.7))], Decoding())
        return found.text

    return answer


def engines() -> set[int]:
    """Processes of the PLM owner's replicas."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith("ray::ServeReplica:pema:PLMEngine"):
            found.add(process.pid)
    return found


PROMPTS = ["Rewrite each", "Formal:", "Informal: thx", "Rewrite each Bible verse", "I would", "gimme an", "your answer"]


async def ask(url: str, prompt: str, model: str = "mine") -> str:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=90) as client:
        asked = {"model": model, "prompt": prompt, "max_tokens": MOST, "temperature": 0}
        stream = await client.completions.create(**asked, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])


async def test_replicas_that_are_killed_change_no_answer(application, expected):
    url, _ = application
    want = [expected(prompt) for prompt in PROMPTS]
    assert await asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS)) == want
    before = engines()
    assert len(before) == 2
    answers = asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS * 2))
    await asyncio.sleep(0.3)
    os.kill(min(before), signal.SIGKILL)
    assert await answers == want * 2
    answers = asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS))
    await asyncio.sleep(0.1)
    for pid in engines():  # all there are: answers wait until Serve has others
        os.kill(pid, signal.SIGKILL)
    assert await answers == want
    assert engines().isdisjoint(before)


async def test_sessions_keep_to_their_replica_and_leave_nothing_behind(application, expected):
    url, _ = application
    want = [expected(prompt) for prompt in PROMPTS]
    for _ in range(2):
        assert await asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS)) == want
    handle = serve.get_deployment_handle("PLMEngine", "pema")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        states = await asyncio.gather(*(handle.state.remote() for _ in range(8)))
        if {s["replica"] for s in states} and not any(s["live_sessions"] for s in states):
            break
        await asyncio.sleep(0.2)
    assert not any(state["live_sessions"] for state in states)


@pytest.mark.slow
async def test_an_application_deployed_anew_takes_other_adapters(application, expected, tmp_path, adapter):
    url, args = application
    renamed = {**args, "live": {"adapters": {"renamed": str(adapter)}}}
    answers = asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS))
    await asyncio.get_running_loop().run_in_executor(None, lambda: serve.run(local(renamed), name="pema"))
    assert await answers == [expected(prompt) for prompt in PROMPTS]  # the old replica finishes what it has begun
    assert await ask(url, PROMPTS[0], model="renamed") == expected(PROMPTS[0])
    with pytest.raises(openai.NotFoundError):
        await ask(url, PROMPTS[0], model="mine")
    assert ray.is_initialized()
