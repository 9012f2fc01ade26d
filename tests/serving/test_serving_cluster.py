"""Both owners under Ray Serve: replicas die, the application is redeployed, and no answer changes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import psutil
import pytest
import ray
from api_kit import offline_answers, offline_texts, save_adapter
from ray import serve

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.data_owner.decoding import Answer, GenerationRequest, Predictor, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.line import BlockingPLM, PLMClient, Step, Stepped
from pema_ray.pema.serving.local import local
from pema_ray.plm_owner.service.replicas import Replicas

pytestmark = pytest.mark.cluster
MAX_TOKENS = 30  # tokens of an answer
PROMPTS = ["Rewrite each", "Formal:", "Informal: thx", "Rewrite each Bible verse", "I would", "gimme an", "your answer"]
BROKEN = (openai.OpenAIError, httpx.HTTPError, httpx2.HTTPError)  # what a client sees of a stream that was cut off


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def adapter(tiny_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny_source("llama").describe().card, folder)
    return folder


@pytest.fixture(scope="module")
def application(ray_cluster, tiny_plm_folder, adapter):
    plm = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu"}
    args = {
        "plm": plm,
        "engine": {"slots": 8, "max_tokens": 90, "forget_seconds": 8},
        "decoder": {"lambda_max": 0.7, "timeout_seconds": 60, "dtype": "float32"},  # as exact as the offline decoder
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
def expected(tiny_source, adapter) -> Callable[[str], str]:
    """What the offline decoder answers to each of PROMPTS."""
    texts = offline_texts(tiny_source("llama"), adapter, PROMPTS, MAX_TOKENS, 0.7)
    return dict(zip(PROMPTS, texts, strict=True)).__getitem__


def engines(deployment: str = "PLMEngine") -> set[int]:
    """Processes of a deployment's replicas."""
    pids = set()
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith(f"ray::ServeReplica:pema:{deployment}"):
            pids.add(process.pid)
    return pids


async def ask(url: str, prompt: str, model: str = "mine", began: list[str] | None = None) -> str:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=90) as client:
        parameters = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
        stream = await client.completions.create(**parameters, stream=True)  # returns after the first event
        if began is not None:
            began.append(prompt)
        return "".join([piece.choices[0].text async for piece in stream])


async def test_answers_survive_killed_replicas(application, expected):
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


async def test_every_session_is_closed_after_its_answer(application, expected):
    url, _ = application
    want = [expected(prompt) for prompt in PROMPTS]
    for _ in range(2):
        assert await asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS)) == want
    await until_no_session_lives()


async def until_no_session_lives(seconds: float = 25) -> None:
    handle = serve.get_deployment_handle("PLMEngine", "pema")
    deadline, states = time.monotonic() + seconds, []
    while time.monotonic() < deadline:
        states = await asyncio.gather(*(handle.state.remote() for _ in range(8)), return_exceptions=True)
        if all(isinstance(state, dict) and not state["live_sessions"] for state in states):
            return
        await asyncio.sleep(0.2)
    raise AssertionError(states)


@pytest.mark.slow
def test_an_offline_generation_survives_five_kills_of_the_plm_owner(application, tiny_source, adapter):
    """Over a Serve handle: every replica dies five times, and the answers stay the undisturbed ones."""
    bundle = tiny_source("llama").lm_head()
    predictor = Predictor(bundle.head, PemaAdapter.from_pretrained(adapter, bundle.card))
    tokenizer, schedule = bundle.tokenizer(), UnrollingSchedule(0.7, "linear")
    kinds = (SamplingParams(), SamplingParams("sample", seed=5), SamplingParams("beam", beams=2))
    requests = [
        GenerationRequest(tokenizer.encode(prompt), 60, schedule, "mine", 60, kinds[n % 3], stream=n)
        for n, prompt in enumerate(PROMPTS * 2)
    ]
    undisturbed = tiny_source("llama")
    expected_answers = undisturbed._runner.run(offline_answers(undisturbed.client, bundle, predictor, requests))
    with BlockingPLM(Replicas.of_application("pema")) as plm:
        answers, kills = plm._runner.run(_disturbed(plm.client, bundle, predictor, requests))
    assert kills == 5
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected_answers]
    assert [answer.finish for answer in answers] == [answer.finish for answer in expected_answers]


class Counted:
    """A slow PLM owner that counts its answered messages."""

    def __init__(self, client: PLMClient) -> None:
        self._client, self.answered = client, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        await asyncio.sleep(0.05)
        outcomes = await self._client.step(steps)
        self.answered += all(isinstance(outcome, Stepped) for outcome in outcomes)
        return outcomes


async def _disturbed(client, bundle, predictor, requests) -> tuple[list[Answer], int]:
    """The answers while both replicas are killed up to five times, each time after some progress."""
    counted: Any = Counted(client)
    kills, answered = 0, 0
    task = asyncio.create_task(offline_answers(counted, bundle, predictor, requests))
    while kills < 5 and not task.done():
        await asyncio.sleep(0.05)
        if counted.answered >= answered + 2 and await asyncio.to_thread(_running) == 2:
            for pid in engines():
                os.kill(pid, signal.SIGKILL)
            kills, answered = kills + 1, counted.answered
    return await task, kills


def _running() -> int:
    """The number of running replicas; Serve waits longer and longer to replace replicas that die."""
    return serve.status().applications["pema"].deployments["PLMEngine"].replica_states.get("RUNNING", 0)


@pytest.mark.slow
async def test_clients_that_disconnect_at_any_moment_leave_no_session(application):
    """Sessions end before `forget_seconds`: their steps are cancelled, or closed on arrival."""
    url, args = application
    draw = random.Random(0)
    for _ in range(6):
        requests = [asyncio.create_task(ask(url, prompt * 4)) for prompt in PROMPTS]
        for task in requests:
            await asyncio.sleep(draw.uniform(0, 0.03))
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    await until_no_session_lives(args["engine"]["forget_seconds"] - 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
async def test_sixteen_sessions_survive_kills_at_random_moments(application, expected, seed):
    url, _ = application
    draw = random.Random(seed)
    sixteen = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    want = [expected(prompt) for prompt in sixteen]
    answers = asyncio.gather(*(ask(url, prompt) for prompt in sixteen))
    kills = 0
    while not answers.done() and kills < 4:
        await asyncio.sleep(draw.uniform(0.02, 0.4))
        if alive := sorted(engines()):
            os.kill(draw.choice(alive), signal.SIGKILL)
            kills += 1
    assert kills
    assert await asyncio.wait_for(answers, 90) == want
    await until_no_session_lives()


@pytest.mark.slow
async def test_a_killed_data_owner_is_replaced_and_leaves_no_session(application, expected):
    url, _ = application
    answers = [asyncio.create_task(ask(url, prompt)) for prompt in PROMPTS]
    await asyncio.sleep(0.1)
    for pid in engines("DataOwner"):
        os.kill(pid, signal.SIGKILL)
    outcomes = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 60)
    for prompt, outcome in zip(PROMPTS, outcomes, strict=True):  # an error or the right answer; no call hangs
        is_error = isinstance(outcome, openai.OpenAIError | httpx.HTTPError | httpx2.HTTPError)
        assert is_error or expected(prompt).startswith(outcome)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert await ask(url, PROMPTS[0]) == expected(PROMPTS[0])
            break
        except BROKEN:
            await asyncio.sleep(0.5)
    else:
        raise AssertionError("the data owner does not come back")
    assert await asyncio.gather(*(ask(url, prompt) for prompt in PROMPTS)) == [expected(prompt) for prompt in PROMPTS]
    await until_no_session_lives()


@pytest.mark.slow
async def test_a_redeployed_application_serves_other_adapters(application, expected, tmp_path, adapter):
    url, args = application
    renamed = {**args, "live": {"adapters": {"renamed": str(adapter)}}}
    began: list[str] = []
    answers = asyncio.gather(*(ask(url, prompt, began=began) for prompt in PROMPTS))
    while len(began) < len(PROMPTS):  # later requests would not find the model any more
        await asyncio.sleep(0.005)
    await asyncio.get_running_loop().run_in_executor(None, lambda: serve.run(local(renamed), name="pema"))
    assert await answers == [expected(prompt) for prompt in PROMPTS]  # the old replica finishes what it has begun
    assert await ask(url, PROMPTS[0], model="renamed") == expected(PROMPTS[0])
    with pytest.raises(openai.NotFoundError):
        await ask(url, PROMPTS[0], model="mine")
    assert ray.is_initialized()


@pytest.mark.slow
async def test_answers_survive_autoscaling(application, expected):
    """Autoscaling 1 → 3 → 1 replicas under load."""
    url, args = application
    scale = {"replicas": 1, "max_replicas": 3, "sessions_per_replica": 2, "upscale_seconds": 0, "downscale_seconds": 2}
    scaled = {**args, "engine": {**args["engine"], "idle_seconds": 1}, "plm_owner": {**scale, "cpus": 0.1}}
    await asyncio.to_thread(lambda: serve.run(local(scaled), name="pema"))
    peak, until = 1, time.monotonic() + 90
    while peak < 3 and time.monotonic() < until:
        prompts = PROMPTS * 2
        assert await asyncio.gather(*(ask(url, prompt) for prompt in prompts)) == [expected(p) for p in prompts]
        peak = max(peak, len(engines()))
    assert peak == 3
    until = time.monotonic() + 90
    while len(engines()) > 1 and time.monotonic() < until:
        assert await ask(url, PROMPTS[0]) == expected(PROMPTS[0])
        await asyncio.sleep(0.5)
    assert len(engines()) == 1
    assert await ask(url, PROMPTS[1]) == expected(PROMPTS[1])
    await until_no_session_lives()


@pytest.mark.slow
def test_answers_survive_dying_nodes(tiny_plm_folder, adapter, expected, tmp_path):
    """Two nodes hold a replica each; one dies, another joins, then the second dies, during 16 answers each."""
    args = {
        "plm": {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu"},
        "engine": {"slots": 16, "max_tokens": 90, "forget_seconds": 8},
        "decoder": {"lambda_max": 0.7, "timeout_seconds": 110, "dtype": "float32"},
        "live": {"adapters": {"mine": str(adapter)}},
        "plm_owner": {"replicas": 2, "cpus": 0.5, "resources": {"weights": 1}},
        "data_owner": {"cpus": 0.5, "resources": {"texts": 1}},  # on the node that stays
    }
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    settings = {"args": args, "prompts": prompts, "port": free_port()}
    folder = Path(__file__).parent
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent)])
    command = [sys.executable, str(folder / "node_deaths.py"), json.dumps(settings)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    expected_answers = [expected(prompt) for prompt in prompts]
    for when in ("undisturbed", "one node died", "the other died too"):
        assert report[when] == expected_answers, when
