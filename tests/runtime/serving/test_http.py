"""Every service answers bad requests in one form, assigns ids, limits bodies and writes an access log."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from pema_ray.errors import UserError
from pema_ray.runtime.serving.http import Admission, handle_errors


class Conflict(UserError):
    pass


class Body(BaseModel):
    texts: list[str]


@pytest.fixture
def counts() -> list[str]:
    return []


@pytest.fixture
def client(counts) -> TestClient:
    api = FastAPI()
    api.add_middleware(Admission, max_bytes=2**20, count=counts.append)
    handle_errors(api, lambda error: 409 if isinstance(error, Conflict) else 400, not_found="model_not_found")

    @api.post("/echo")
    async def echo(body: Body) -> Any:
        if "conflict" in body.texts:
            raise Conflict("Somebody was faster.")
        if "refused" in body.texts:
            raise UserError("Half a character: \ud83d.")
        return {"texts": body.texts}

    @api.get("/broken")
    async def broken() -> Any:
        raise ZeroDivisionError

    @api.get("/healthz")
    async def health() -> Any:
        return {"ready": True}

    return TestClient(api, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("request_", "status", "message", "code"),
    [
        (("POST", "/echo", {"texts": 3}), 400, "texts: Input should be a valid list", None),
        (("POST", "/echo", {}), 400, "texts: Field required", None),
        (("POST", "/echo", {"texts": ["conflict"]}), 409, "Somebody was faster.", None),
        (("POST", "/echo", {"texts": ["refused"]}), 400, "Half a character: ?.", None),
        (("GET", "/nothing", None), 404, "Not Found", "model_not_found"),
        (("GET", "/echo", None), 405, "Method Not Allowed", None),
        (("POST", "/echo", {"texts": ["x" * 2**20]}), 413, "The request is longer than 1 MiB.", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_have_one_form(client, counts, request_, status: int, message: str, code: str | None):
    method, path, body = request_
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    assert answer.json() == {"error": error}
    assert counts == ["requests", f"refused_{status}"]
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_a_valid_id_is_kept_and_any_other_is_replaced(client):
    answers = [client.post("/echo", json={"texts": []}, headers={"X-Request-Id": id_}) for id_ in ("id-1", "x" * 65)]
    assert answers[0].headers["x-request-id"] == "id-1"
    assert len(answers[1].headers["x-request-id"]) == 32
    assert client.get("/nothing").headers["x-request-id"] != client.get("/nothing").headers["x-request-id"]


def test_the_log_has_no_text_and_health_checks_are_not_in_it(client, counts, caplog):
    with caplog.at_level(logging.INFO, "pema_ray.runtime.serving.http"):
        client.post("/echo", json={"texts": ["a secret"]})
        client.get("/healthz")
        client.get("/broken")
    [record, failed] = caplog.records
    assert (record.path, record.status, record.bytes) == ("/echo", 200, 22)
    assert failed.status == 500 and "secret" not in caplog.text
    assert counts == ["requests", "requests", "refused_500"]
