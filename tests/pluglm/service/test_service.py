"""The service: responses name their version, edits need a key, and edits drop no request."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.service.editor_keys import hash_of, new_key
from pema_ray.pluglm.service.service import PlugLMService, make_api
from pema_ray.pluglm.stages.finetune import new_task_model
from pema_ray.pluglm.stages.pretrain import save_model
from pema_ray.pluglm.tasks import make_task

KEY, HASH = new_key()
EDITOR = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def service(tmp_path, model, words_tokenizer, facts) -> PlugLMService:
    save_model(model, words_tokenizer, tmp_path / "model")
    KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer), "float32")
    return PlugLMService(
        {"fill_mask": str(tmp_path / "model"), "memory": str(tmp_path / "memory"), "editors": (HASH,), "max_texts": 4}
    )


def client(service: PlugLMService) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_api(service)), base_url="http://service")


def probabilities(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    return logits[0, inputs["input_ids"][0] == tokenizer.mask_token_id][0].softmax(-1)


def test_masked_words_with_the_version_that_gave_them(service, model, words_tokenizer, tmp_path) -> None:
    async def ask() -> Any:
        async with client(service) as c:
            return (
                await c.post("/v1/fill-mask", json={"texts": ["w1 [MASK] w2", "w3 [MASK]"], "explain": True})
            ).json()

    answer = asyncio.run(ask())
    memory = KnowledgeMemory.open(tmp_path / "memory")
    assert (answer["memory"], answer["memory_version"]) == ("memory version 1", 1)
    model.attach(memory.load(model.fingerprint()))
    expected = probabilities(model, words_tokenizer, "w1 [MASK] w2").topk(5)
    (mask,) = answer["results"][0]["masks"]
    assert [word["token"] for word in mask] == [words_tokenizer.decode([token]) for token in expected.indices.tolist()]
    assert [word["probability"] for word in mask] == pytest.approx(expected.values.tolist(), abs=1e-5)
    (layer,) = answer["results"][0]["retrieved"]
    assert len(layer) == 3
    assert sum(entry["weight"] for entry in layer) == pytest.approx(1)
    assert all(entry["text"].startswith("w") for entry in layer)


def test_edits_need_a_key_and_change_answers(service, tmp_path) -> None:
    wrong = {"edits": [{"action": "replace", "entry_id": 3, "text": "w99 w98"}, {"action": "delete", "entry_ids": 4}]}
    good = {"edits": [{"action": "replace", "entry_id": 3, "text": "w99 w98", "source": "editor"},
                      {"action": "delete", "entry_id": 4}, {"action": "add", "text": "w97"}]}  # fmt: skip

    async def ask() -> None:
        async with client(service) as c:
            for headers in ({}, {"authorization": "Bearer pluglm-wrong"}, {"authorization": f"Basic {KEY}"}):
                answer = await c.post("/v1/memory/edit", json=wrong, headers=headers)
                assert answer.status_code == 401
            for body, status, words in (
                (wrong, 400, "unknown key"),
                ({"edits": []}, 400, "edits"),
                ({"edits": [{"action": "delete"}]}, 400, "needs an entry_id"),
                ({"edits": [{"action": "add", "text": " "}]}, 400, "has no text"),
                ({"edits": [{"action": "delete", "entry_id": 77}]}, 400, "has no entry 77"),
                ({"edits": [{"action": "delete", "entry_id": n} for n in range(10)]}, 400, "2 entries would be left"),
                ({**good, "only_on": 9}, 409, "version 1 is current"),
                # the last of three fails, so the first two are not published
                ({"edits": [*good["edits"][:2], {"action": "delete", "entry_id": 4}]}, 400, "has no entry 4"),
            ):
                answer = await c.post("/v1/memory/edit", json=body, headers=EDITOR)
                assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text
            answer = await c.post("/v1/memory/edit", content=b"{", headers=EDITOR)
            assert answer.status_code == 400
            assert service.version == 1
            answer = await c.post("/v1/memory/edit", json={**good, "only_on": 1}, headers=EDITOR)
            assert answer.json() == {"memory": "memory version 2", "version": 2, "entries": 12}
            answer = await c.post("/v1/fill-mask", json={"texts": ["w1 [MASK]"]})
            assert answer.json()["memory_version"] == 2

    asyncio.run(ask())
    memory = KnowledgeMemory.open(tmp_path / "memory")
    (entry,) = memory.entries([3])
    assert (entry.text, entry.source) == ("w99 w98", "editor")
    assert (memory.version, memory.manifest.action) == (2, "replace 3; delete 4; add 1")


def test_an_edit_that_cannot_be_read_here_is_told_as_published(service, monkeypatch) -> None:
    """The response names the edit's version; answers keep and name the previous one."""
    load = KnowledgeMemory.load

    def fails(self, *arguments, **options):
        if self.version > 1:
            raise UserError("the disk is gone")
        return load(self, *arguments, **options)

    monkeypatch.setattr(KnowledgeMemory, "load", fails)

    async def ask() -> None:
        async with client(service) as c:
            edit = {"edits": [{"action": "add", "text": "w97"}]}
            answer = await c.post("/v1/memory/edit", json=edit, headers=EDITOR)
            assert (answer.status_code, answer.json()["version"]) == (202, 2)
            message = answer.json()["warning"]
            assert message.startswith("memory version 2 was published with these edits, but")
            assert "still answers by version 1: the disk is gone" in message
            answer = await c.post("/v1/fill-mask", json={"texts": ["w1 [MASK]"]})
            assert answer.json()["memory_version"] == 1

    asyncio.run(ask())


def test_a_version_that_one_model_refuses_is_attached_to_none(service, model, words_tokenizer, tmp_path) -> None:
    """Two models; the second refuses the next version. Both keep the version that answers name."""
    service._models["classify"] = (type(model)(model.config), words_tokenizer)
    second = service._models["classify"][0]
    second.attach(service._knowledge, allow_stale=True)

    def refuses(knowledge: Any, allow_stale: bool = False) -> None:
        if knowledge.version > 1:
            raise UserError("not this one")

    second.attach = refuses
    KnowledgeMemory.open(tmp_path / "memory").delete([0])
    with pytest.raises(UserError, match="not this one"):
        service._follow()
    assert service.version == 1
    assert {model.knowledge.version for model, _ in service._models.values()} == {1}


def test_no_request_is_dropped_while_the_memory_is_edited(service, model, words_tokenizer, tmp_path) -> None:
    text, answers, done = "w1 w2 [MASK]", [], asyncio.Event()

    async def ask(c: httpx.AsyncClient) -> None:
        while not done.is_set():
            answers.append(await c.post("/v1/fill-mask", json={"texts": [text], "top": 1}))

    async def edit(c: httpx.AsyncClient) -> None:
        for number in range(6):
            change = {"action": "replace", "entry_id": number, "text": f"w{50 + number} w{70 + number}"}
            answer = await c.post("/v1/memory/edit", json={"edits": [change]}, headers=EDITOR)
            assert answer.json()["version"] == number + 2
        done.set()

    async def edit_and_ask() -> None:
        async with client(service) as c:
            await asyncio.gather(edit(c), *(ask(c) for _ in range(4)))

    asyncio.run(edit_and_ask())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["memory_version"] for answer in answers}) > 2
    for answer in (answer.json() for answer in answers):
        model.attach(KnowledgeMemory.open(tmp_path / "memory", answer["memory_version"]).load(model.fingerprint()))
        best = probabilities(model, words_tokenizer, text).max()
        assert answer["results"][0]["masks"][0][0]["probability"] == pytest.approx(float(best), abs=1e-5)


def test_versions_of_others_are_followed(service, encoder, tmp_path) -> None:
    KnowledgeMemory.open(tmp_path / "memory").add([NewEntry("w5")], encoder)
    service.config = service.config.model_copy(update={"follow_seconds": 0.01})

    async def wait() -> None:
        task = asyncio.create_task(service.follow())
        async with asyncio.timeout(20):
            while service.version != 2:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(wait())


def test_classes(service, words_tokenizer, tmp_path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"sentence": "w1", "label": "good"}\n{"sentence": "w2", "label": "bad"}\n')
    config = FinetuneConfig.model_validate(
        {"model": str(tmp_path / "model"), "task": {"kind": "classification"},
         "data": {"train": str(path), "validation": str(path)}}
    )  # fmt: skip
    task = make_task(config.task)
    task.prepare(task.read(path))
    fingerprint = KnowledgeMemory.open(tmp_path / "memory").fingerprint
    save_model(new_task_model(config, task, fingerprint), words_tokenizer, tmp_path / "classifier")
    classifying = PlugLMService(service.config.model_dump() | {"classifier": str(tmp_path / "classifier")})

    async def ask() -> None:
        async with client(classifying) as c:
            answer = (await c.post("/v1/classify", json={"texts": ["w1 w2", "w3"]})).json()
            assert answer["memory_version"] == 1
            for result in answer["results"]:
                assert {one["label"] for one in result["classes"]} == {"good", "bad"}
                assert sum(one["probability"] for one in result["classes"]) == pytest.approx(1)

    asyncio.run(ask())


def test_requests_and_settings_that_are_refused(service, tmp_path) -> None:
    async def ask() -> None:
        async with client(service) as c:
            for path, body, words in (
                ("fill-mask", {"texts": ["w1"]}, r"Text 1 has no [MASK]"),
                ("fill-mask", {"texts": ["w1 [MASK]"] * 5}, "takes 4"),
                ("fill-mask", {"texts": ["w1 " * 60 + "[MASK]"]}, "reads 48"),
                ("classify", {"texts": ["w1"]}, "no model for classify"),
            ):
                answer = await c.post(f"/v1/{path}", json=body)
                assert (answer.status_code, words in answer.text) == (400, True), answer.text

    asyncio.run(ask())
    folder = {"memory": str(tmp_path / "memory")}
    for settings, message in (
        (folder, "give fill_mask or classifier"),
        (folder | {"fill_mask": "x", "editors": (KEY,)}, "64 hexadecimal digits"),
        (folder | {"classifier": "x", "editors": (HASH,)}, "edits need fill_mask"),
        (folder | {"fill_mask": str(tmp_path)}, "no PlugLM model here"),
    ):
        with pytest.raises(UserError, match=message):
            PlugLMService(settings)
    assert hash_of(KEY) == HASH
    assert KEY not in HASH
