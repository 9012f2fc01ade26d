"""Every decoding mode gives the same answers in this process, over a Serve handle and over HTTPS."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from decoding_kit import BEAM, GREEDY, LOOKING, PROMPTS, SAMPLE, answers, attributions, head_of, make_adapter, states
from serving_kit import DirectHandle

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.decoding import Answer, GenerationRequest, Predictor
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.data_owner.remote import RemotePLM
from pema_ray.line import PLMClient
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import encode
from pema_ray.plm_owner import LoadedPLM
from pema_ray.plm_owner.service.access import Access, Quota, add_client
from pema_ray.plm_owner.service.api import RequestLimits, make_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas

ROUNDING = 5e-5
"""Of a probability. Replicas compose passes as messages arrive, so that float32 states differ in their last bits
(observed: 1.05e-5); another λ, token or distribution differs far more."""


def predictors_of(plm: LoadedPLM) -> dict[str, Predictor]:
    """An adapter of one state, one that looks back, neighbours, and an adapter with neighbours."""
    head = head_of(plm)
    key = states(plm, list(range(3, 90))).float().numpy()
    place = np.arange(len(key))
    rows = MemoryRows(encode(key, "float32"), (place % 7 + 3).astype(np.int32), place, place.astype(np.int32))
    neighbours, adapter = NearestNeighbours(rows, head, 8, 20.0), make_adapter(plm, predicts_lambda=True)
    return {
        "mine": Predictor(head, make_adapter(plm)),
        "looking back": Predictor(head, make_adapter(plm, **LOOKING["look back"])),
        "kNN": Predictor(head, None, neighbours),
        "kNN beside": Predictor(head, adapter, neighbours, 0.3),
    }


def every_mode() -> list[GenerationRequest]:
    schedule = UnrollingSchedule(0.8, "linear", 0.1)
    modes = [
        {"adapter": None},
        {"sampling": GREEDY},
        {"sampling": SAMPLE},
        {"sampling": BEAM},
        {"draft": 4},
        {"sampling": SAMPLE, "draft": 4},
        {"adapter": "looking back"},
        {"adapter": "looking back", "sampling": BEAM},
        {"adapter": "kNN"},
        {"adapter": "kNN beside"},
    ]
    base = [GenerationRequest(p, 10, schedule, "mine", 8, explain=True, stream=n) for n, p in enumerate(PROMPTS[:3])]
    return [replace(request, **mode) for mode in modes for request in base]


@asynccontextmanager
async def over_https(handle: DirectHandle, folder: Path) -> AsyncIterator[RemotePLM]:
    """A client of the PLM owner's API, without a socket in between."""
    keys, key_file = folder / "keys.yaml", folder / "key"
    key_file.write_text(add_client(keys, "data owner", Quota()))
    limits = RequestLimits(max_steps=7, max_rows=40)  # so that steps are spread over several messages
    api = make_api(Access(keys), limits, lambda name, fingerprint: Replicas(handle, name, fingerprint))
    config = PLMConfig(url="https://plm.example.org", key_file=str(key_file))
    remote = RemotePLM(config, transport=httpx.ASGITransport(api))
    try:
        yield remote
    finally:
        await remote.end()


async def test_every_mode_gives_the_same_over_every_line(
    architecture, tiny_client, tiny_plm, tiny_plm_folder, tmp_path
):
    """Tokens, texts and finish reasons are equal; in lockstep, so are λ and probabilities up to rounding."""
    pytest.importorskip("faiss")
    plm, requests = tiny_plm(architecture), every_mode()
    predictors = predictors_of(plm)
    settings = {"name": tiny_plm_folder(architecture), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(settings, {"slots": 48}), replicas=2)

    async def answers_over(client: PLMClient, lockstep: bool = True) -> list[Answer]:
        return await answers(client, requests, predictors, lockstep=lockstep, max_sequences=48)

    local = await answers_over(tiny_client(architecture, slots=48))
    async with over_https(handle, tmp_path) as remote:
        in_lockstep = [await answers_over(Replicas(handle)), await answers_over(remote)]
        served = await answers_over(remote, lockstep=False)
    for replica in handle.replicas.values():
        await replica.plm.end()
    for answered in (*in_lockstep, served):
        assert [(a.ids, a.finish, a.text) for a in answered] == [(a.ids, a.finish, a.text) for a in local]
    for answered in in_lockstep:
        for expected_tokens, tokens in zip(map(attributions, local), map(attributions, answered), strict=True):
            assert [a.lam for a in tokens] == pytest.approx([a.lam for a in expected_tokens], abs=ROUNDING)
            for field in ("log_pema", "log_plm"):
                expected = [math.exp(getattr(a, field)) for a in expected_tokens]
                assert [math.exp(getattr(a, field)) for a in tokens] == pytest.approx(expected, abs=ROUNDING)
