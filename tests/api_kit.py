"""The data owner's API on a port of this machine, and the answers of the offline decoder to compare it with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from serving_kit import DirectHandle

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding import Answer, Decoder, GenerationRequest, Predictor
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.data_owner.prefixed import PrefixedPLM, TrainedPrefix
from pema_ray.data_owner.service.api import make_api
from pema_ray.data_owner.service.service import DataOwner
from pema_ray.line import BlockingPLM, LMHeadBundle, ModelCard, PLMClient
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas

MAX_TOKENS = 80  # of a prompt and its answer


def save_adapter(card: ModelCard, folder: Path, seed: int = 3) -> PemaAdapter:
    """A random adapter of a PLM."""
    torch.manual_seed(seed)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint, residual=True))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    adapter.save_pretrained(folder)
    return adapter.eval()


async def offline_answers(
    client: PLMClient,
    bundle: LMHeadBundle,
    predictor: Predictor,
    requests: Sequence[GenerationRequest],
    max_sequences: int = 8,
) -> list[Answer]:
    """What a stage answers: by a decoder in lockstep, with no more sequences at a time than a replica has slots."""
    eos = bundle.card.eos_token_ids
    decoder = Decoder(client, bundle.head, bundle.tokenizer(), eos, max_sequences, lockstep=True)
    decoder.predictors = {request.adapter: predictor for request in requests if request.adapter}
    try:
        return await decoder.generate(requests)
    finally:
        await decoder.stop()


def offline_texts(source: BlockingPLM, adapter: Path, prompts: Sequence[str], limit: int, lam: float) -> list[str]:
    """Greedy answers of at most `limit` tokens with an adapter and a constant λ."""
    bundle = source.lm_head()
    predictor = Predictor(bundle.head, PemaAdapter.from_pretrained(adapter, bundle.card))
    schedule, tokenizer = UnrollingSchedule(lam), bundle.tokenizer()
    requests = [GenerationRequest(tokenizer.encode(prompt), limit, schedule, "mine") for prompt in prompts]
    answers = source._runner.run(offline_answers(source.client, bundle, predictor, requests))
    return [answer.text for answer in answers]


class Service:
    """The API with one replica of the PLM owner.

    Args:
        live: adapters and tasks, as `DataOwnerUserConfig` takes them.
        decoder: settings, as `DecoderConfig` takes them.
        prefix: of the data owner; none by default.
        engine: settings of the PLM owner's engine.
    """

    def __init__(
        self,
        plm_folder: str,
        live: Mapping[str, Any],
        decoder: Mapping[str, Any] | None = None,
        prefix: TrainedPrefix | None = None,
        **engine: Any,
    ) -> None:
        plm = {"name": plm_folder, "dtype": "float32", "device": "cpu", "threads": 1}
        settings = {"slots": 8, "max_tokens": MAX_TOKENS, **engine}
        self.handle = DirectHandle(lambda: PLMEngine(plm, settings))
        exact = {"lambda_max": 0.7, "timeout_seconds": 20, **(decoder or {}), "dtype": "float32"}

        def connect() -> PLMClient:
            replicas = Replicas(self.handle)
            return replicas if prefix is None else PrefixedPLM(replicas, prefix)

        self.owner, self._live = DataOwner(connect, exact), live

    async def __aenter__(self) -> Service:
        await self.owner.change(self._live)
        await self.owner.start()
        config = uvicorn.Config(make_api(self.owner), port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        self._server.should_exit = True
        await self._task
        await self.owner.decoder.stop()
        for replica in self.handle.replicas.values():
            await replica.plm.end()

    async def until_idle(self) -> None:
        """Wait until no answer is being generated and the PLM owner holds no session."""
        for _ in range(200):
            states = [await replica.state() for replica in self.handle.replicas.values()]
            if not self.owner.decoder.live and not any(state["live_sessions"] for state in states):
                return
            await asyncio.sleep(0.02)
        raise AssertionError("sessions are left")
