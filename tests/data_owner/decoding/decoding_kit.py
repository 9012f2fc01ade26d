"""Shared by the decoder's tests: adapters, requests, PLM owners with faults, and distributions computed by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from serving_kit import DirectHandle

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding import Answer, Attribution, Decoder, GenerationRequest, Predictor, SamplingParams
from pema_ray.data_owner.decoding.request import Token
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule, mix
from pema_ray.line import LMHead, PLMClient, Step, Stepped
from pema_ray.plm_owner import LoadedPLM
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas

PROMPTS = [[0, 40, 77, 120, 9], [0, 200, 31], [0, 61, 62, 63, 64, 65, 66, 67, 68], [0, 5]]
STEPS = 14
GREEDY, SAMPLE, BEAM = SamplingParams(), SamplingParams("sample", top_p=0.9), SamplingParams("beam", beams=3)
_BLOCK, _LOCAL = {"look_back_layers": 1, "look_back_width": 16}, {"local_memory_width": 16}
LOOKING: dict[str, dict[str, Any]] = {
    "look back": {**_BLOCK, "look_back_layers": 2, "prompt_from": 2},
    "local memory": _LOCAL,
    "both, λ predicted": {**_BLOCK, **_LOCAL, "predicts_lambda": True, "prompt_from": 3},
}
"""Settings of adapters that look back."""


@cache
def head_of(plm: LoadedPLM) -> LMHead:
    return export_lm_head(plm).head


def make_adapter(plm: LoadedPLM, seed: int = 0, **settings: Any) -> PemaAdapter:
    """A random adapter as confident as the PLM but with other predictions; its λ, if predicted, varies."""
    card = export_lm_head(plm).card
    torch.manual_seed(seed)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint, **settings))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        torch.nn.init.orthogonal_(adapter.A)
        torch.nn.init.normal_(adapter.B_pd, std=0.7)
        if adapter.gate is not None:
            torch.nn.init.normal_(adapter.gate.weight, std=0.3)
            adapter.gate.bias.fill_(0.5)
    return adapter.eval()


def requests(lam: float = 0.5, **changes: Any) -> list[GenerationRequest]:
    """One for each prompt; its index is its stream."""
    plain = [GenerationRequest(p, STEPS, UnrollingSchedule(lam), "mine", stream=n) for n, p in enumerate(PROMPTS)]
    return [replace(request, **changes) for request in plain]


def various(**changes: Any) -> list[GenerationRequest]:
    """Requests that differ in schedule, length and limit."""
    schedules = [
        UnrollingSchedule(0.9, "quadratic"),
        UnrollingSchedule(0.6, "linear", 0.1),
        UnrollingSchedule(0.4),
        UnrollingSchedule(0.9, "quadratic", 0.25),
    ]
    settings = zip(requests(**changes), schedules, (5, 9, 1, 3), (7, 14, 11, 1), strict=True)
    return [
        replace(request, schedule=schedule, length=length, max_new_tokens=steps)
        for request, schedule, length, steps in settings
    ]


# ── decoders and PLM owners ─────────────────────────────────────────────────


@asynccontextmanager
async def decoding(
    client: PLMClient,
    predictors: Mapping[str, Predictor] | PemaAdapter | None = None,
    eos: Sequence[int] | None = None,
    **settings: Any,
) -> AsyncIterator[Decoder]:
    """A decoder in lockstep, unless the settings say otherwise; an adapter is the one named `mine`."""
    bundle = await client.lm_head()
    ends = bundle.card.eos_token_ids if eos is None else eos
    settings = {"lockstep": True, "max_sequences": 30, **settings}  # an engine has 32 slots
    decoder = Decoder(client, bundle.head, bundle.tokenizer(), ends, **settings)
    if isinstance(predictors, PemaAdapter):
        predictors = {"mine": Predictor(bundle.head, predictors)}
    decoder.predictors = predictors or {}
    try:
        yield decoder
    finally:
        await decoder.stop()


async def answers(
    client: PLMClient,
    requested: Sequence[GenerationRequest],
    predictors: Mapping[str, Predictor] | PemaAdapter | None = None,
    eos: Sequence[int] | None = None,
    **settings: Any,
) -> list[Answer]:
    """Answers of a new decoder."""
    async with decoding(client, predictors, eos, **settings) as decoder:
        return await decoder.generate(requested)


def ids_of(answered: Sequence[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answered]


def attributions(tokens: Answer | Sequence[Token]) -> list[Attribution]:
    """Of every token; each must have one."""
    of_tokens = [token.attribution for token in (tokens.tokens if isinstance(tokens, Answer) else tokens)]
    assert None not in of_tokens
    return [attribution for attribution in of_tokens if attribution is not None]


class Forgetful:
    """A PLM owner that loses all sessions of every n-th message."""

    def __init__(self, client: PLMClient, every: int) -> None:
        self._client, self._every, self._messages, self.lost = client, every, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        self._messages += 1
        if self._messages % self._every == 0:
            open_sessions = [step.session for step in steps if step.position]
            self.lost += len(open_sessions)
            await self._client.close(open_sessions)
        return await self._client.step(steps)


class World:
    """A PLM owner with some replicas, and a data owner's decoder over it that does not decode in lockstep."""

    def __init__(
        self, folder: str, adapter: PemaAdapter, replicas: int = 1, max_sequences: int = 256, **engine
    ) -> None:
        plm = {"name": folder, "dtype": "float32", "device": "cpu", "threads": 1}
        self.handle = DirectHandle(lambda: PLMEngine(plm, {"slots": 8, **engine}), replicas)
        self._adapter, self._max_sequences = adapter, max_sequences

    async def __aenter__(self) -> World:
        self.line = Replicas(self.handle)
        bundle = await self.line.lm_head()
        self.decoder = Decoder(
            self.line, bundle.head, bundle.tokenizer(), bundle.card.eos_token_ids, self._max_sequences
        )
        self.decoder.predictors = {"mine": Predictor(bundle.head, self._adapter)}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.decoder.stop()
        await self.line.end()
        for replica in self.handle.replicas.values():
            await replica.plm.end()

    async def tokens(self, request: GenerationRequest, timeout: float = 60.0) -> list[Token]:
        return [token async for token in self.decoder.answer(request, timeout)]

    async def all(self, requested: Sequence[GenerationRequest]) -> list[list[int]]:
        return ids_of([Answer(tokens) for tokens in await asyncio.gather(*map(self.tokens, requested))])

    async def live_sessions(self) -> int:
        """Waits until all are closed, at most two seconds."""
        count = 0
        for _ in range(100):
            states = [await replica.state() for replica in self.handle.replicas.values()]
            count = sum(state["live_sessions"] for state in states)
            if not count:
                break
            await asyncio.sleep(0.02)
        return count

    def kill(self, name: str) -> None:
        """Kill a replica and add another."""
        self.handle.kill(name)
        self.handle.add()


# ── by hand ─────────────────────────────────────────────────────────────────


@torch.inference_mode()
def states(plm: LoadedPLM, ids: Sequence[int], first: int = 0) -> torch.Tensor:
    """Representations `[T - first, H]` of a sequence, from one pass of the model without any cache."""
    return capture_state(plm, input_ids=torch.tensor([list(ids)]), use_cache=False)[0, first:]


@torch.inference_mode()
def distributions(
    plm: LoadedPLM, adapter: PemaAdapter, ids: Sequence[int], first: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(log P_PEMA, log P_LM)` `[n, V]` of what follows each position from `first` on; for adapters of one state."""
    head = head_of(plm)
    state = states(plm, ids, first % len(ids))
    return adapter.log_probs(state, head, alone=True), head.log_probs(head.norm(state))


def mixture(plm: LoadedPLM, adapter: PemaAdapter, ids: Sequence[int], lam: float) -> torch.Tensor:
    """log P `[V]` of what follows these ids."""
    return mix(*distributions(plm, adapter, ids), torch.tensor([lam]))[0]


def transformers_answers(plm: LoadedPLM, eos: int = 1, **options: Any) -> list[list[int]]:
    """The answers of transformers' `generate`, up to and including EOS; one by one, because padding on the left changes
    the states of state-space layers."""
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": eos, "pad_token_id": 2, **options}
    rows = [plm.model.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in PROMPTS]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]
