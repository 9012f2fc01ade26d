"""What operators use: the figures that the board queries, logs as JSON, request ids."""

from __future__ import annotations

import io
import json
import logging
import re
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml
from serving_kit import DirectHandle

from pema_ray.data_owner.service.api import make_api
from pema_ray.data_owner.service.service import DataOwner
from pema_ray.line import Step, codec
from pema_ray.plm_owner.service.access import Access, Quota, add_client
from pema_ray.plm_owner.service.api import RequestLimits
from pema_ray.plm_owner.service.api import make_api as make_public_api
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas
from pema_ray.runtime.metrics import HISTOGRAMS, LEVELS, TOTALS
from pema_ray.runtime.serving.logs import JsonLines

SERVE_CONFIGS = Path(__file__).parents[2] / "serve_configs"
DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def names() -> set[str]:
    """Every name that Prometheus can have, as Ray writes it."""
    metrics = {f"ray_pema_{owner}_{name}_total" for owner, totals in TOTALS.items() for name in totals}
    metrics |= {f"ray_pema_{owner}_{name}" for owner, levels in LEVELS.items() for name in levels}
    return metrics | {f"ray_pema_{owner}_{name}_bucket" for owner in TOTALS for name in HISTOGRAMS}


def test_the_board_asks_for_figures_that_exist_and_leaves_no_kind_out():
    board = json.loads((SERVE_CONFIGS / "grafana.json").read_text())
    queried = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    plain = set(re.findall(r"\bray_pema_\w+", queried)) - {
        "ray_pema_data_owner_refused_",
        "ray_pema_plm_owner_api_refused_",
    }
    assert plain <= names()
    for kind in ("tokens_total", "live_sessions", "pass_sequences", "cached_tokens", "lambda", "accepted_total",
                 "first_token_seconds", "token_seconds", "replays_total", "refused_"):  # fmt: skip
        assert kind in queried, kind
    cells = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(cells)) == len(cells)


def test_every_figure_is_in_the_docs():
    for table in (*TOTALS.values(), *LEVELS.values(), HISTOGRAMS):
        for name in table:
            assert f"`{name}`" in DOCS, name


@pytest.mark.parametrize("topology", ["local", "cluster", "plm_owner", "data_owner"])
def test_serve_itself_logs_as_json_too(topology):
    written = yaml.safe_load((SERVE_CONFIGS / f"{topology}.yaml").read_text())
    assert written["logging_config"]["encoding"] == "JSON"


@pytest.fixture
async def owner(tiny_plm_folder, anyio_backend):
    plm = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(plm, {"slots": 8, "max_tokens": 80}))
    owner = DataOwner(lambda: Replicas(handle), {"lambda_max": 0.0, "dtype": "float32"})
    await owner.start()
    owner.handle = handle
    yield owner
    await owner.decoder.stop()
    await handle.replicas["r0"].plm.end()


async def test_requests_have_numbers_and_are_logged_and_counted_without_contents(owner):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("pema_ray.runtime.serving.http")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    body = {"model": owner.card.name, "prompt": "Rewrite each secret", "max_tokens": 6, "temperature": 0}
    try:
        transport = httpx.ASGITransport(make_api(owner))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            for stream in (False, True):
                response = await http.post(
                    "/v1/completions", json={**body, "stream": stream}, headers={"X-Request-Id": "7f"}
                )
                assert response.status_code == 200 and response.headers["x-request-id"] == "7f"
            bad = await http.post("/v1/completions", json={**body, "n": -1}, headers={"X-Request-Id": "x" * 65})
            assert bad.status_code == 400 and len(bad.headers["x-request-id"]) == 32
            long = await http.post("/v1/completions", content=b"x" * (2**21 + 1), headers=JSON)
            assert long.status_code == 413
            await http.get("/healthz")
    finally:
        logger.removeHandler(handler)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line["id"], line["status"], line["path"]) for line in lines[:2]] == [("7f", 200, "/v1/completions")] * 2
    assert [line["status"] for line in lines] == [200, 200, 400, 413]
    keys = {"time", "level", "logger", "message", "id", "path", "status", "bytes", "seconds"}
    assert all(set(line) == keys for line in lines)
    assert "secret" not in written.getvalue()
    counts = owner.decoder.counts
    assert (counts["requests"], counts["refused_400"], counts["refused_413"]) == (4, 1, 1)
    assert {name for name in counts if not name.startswith("refused_")} <= set(TOTALS["data_owner"])


JSON = {"Content-Type": "application/json"}


async def test_what_services_count_is_what_is_named(owner, tmp_path):
    key = add_client(tmp_path / "keys.yaml", "them", Quota(sessions=1))
    api = make_public_api(Access(tmp_path / "keys.yaml"), RequestLimits(), partial(Replicas, owner.handle))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://here") as http:
        fingerprint = (await owner.handle.replicas["r0"].describe()).card.fingerprint
        for name, sent, status in (("a", key, 200), ("b", key, 429), ("c", "wrong", 401)):
            body = codec.encode_steps([Step(name, 0, [5, 6])], fingerprint)
            response = await http.post("/v1/sessions/step", content=body, headers={"Authorization": f"Bearer {sent}"})
            assert response.status_code == status
    counts = api.state.counts
    assert (counts["requests"], counts["refused_401"], counts["refused_429"], counts["refused_200"]) == (3, 1, 1, 0)
    assert {name for name in counts if not name.startswith("refused_")} <= set(TOTALS["plm_owner_api"])
    engine = await owner.handle.replicas["r0"].plm.engine()
    assert engine.counts["steps"] >= 1 and set(engine.counts) <= set(TOTALS["plm_owner"])
    assert set(owner.handle.replicas["r0"]._levels(engine)) == set(LEVELS["plm_owner"])
