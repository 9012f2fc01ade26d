"""A request with `source` is answered exactly as the offline stages answer that pair, whatever `generate` says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from api_kit import Service, offline_answers, save_adapter

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer
from pema_ray.memory import Manifest, MemoryRows, ShardInfo
from pema_ray.memory.codec import encode
from pema_ray.memory.shards import write_shard
from pema_ray.pema.config import load_config
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import Run
from pema_ray.pema.serving.run import arguments_of
from pema_ray.pema.stages.answers import make_job, predictor_of, to_row
from pema_ray.tasks.postprocess import RULES

TASK = {
    "name": "reversed",
    "template": "Old: {source}\nModern: ",
    "chat_system": "Be brief.",
    "chat_user": "Old: {source}",
    "columns": {"source": "en", "target": "du"},
    "stop": ["\n"],
    "postprocess": ["in_brackets"],
}
LONG = "the old people have seen the large garden and tell the verse."  # long enough for `task.show: first`
SOURCES = ("the house", "old garden and people", "ye have seen", "tell them the verse", "large")
SHOTS = {"task": {"shots": 1}, "generate": {"max_new_tokens": 8}}
SETTINGS: dict[str, dict[str, Any]] = {
    "lambda falls over the source": {"generate": {"lambda_max": 0.8, "schedule": "linear", "floor": 0.1}},
    "lambda falls over the prompt": {"generate": {"lambda_max": 1.0, "schedule": "quadratic", "length": "prompt"}},
    "lambda falls over 3 tokens": {"generate": {"schedule": "linear", "length": 3}},
    "sampled": {"seed": 7, "generate": {"decoding": "sample", "temperature": 0.7, "top_p": 0.9, "lambda_max": 0.5}},
    "beams": {"generate": {"decoding": "beam", "beams": 3, "length_penalty": 0.5}},
    "stop strings": {"generate": {"stop": ["e", "an"]}},
    "at most 5 tokens": {"generate": {"max_new_tokens": 5}},
    "at most half the source": {"generate": {"max_new_ratio": 0.5, "max_new_tokens": 40}},
    "drafts": {"generate": {"draft": 4}},
    "neighbours": {"generate": {"knn": {"weight": 0.4, "neighbours": 4, "temperature": 10.0}}},
    "chat": {"task": {"chat": True}},
    "first pair shown": SHOTS,
    "first pair shown in a chat": {**SHOTS, "task": {"shots": 1, "chat": True}},
    "similar pair shown": {**SHOTS, "task": {"shots": 1, "show": "similar"}},
}


@pytest.fixture
def trained(experiment: Callable[..., Path], tmp_path: Path, monkeypatch) -> Callable[..., Run]:
    """Makes a run up to a random adapter, with a memory of random rows; its post-processing changes every answer."""
    monkeypatch.setitem(RULES, "in_brackets", lambda answer, source: f"[{answer.strip()}] of {source}")

    def make(**sections: Any) -> Run:
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
        task = {"name": str(tmp_path / "task.yaml"), **sections.pop("task", {})}
        generate = {"max_new_tokens": 24, **sections.pop("generate", {})}
        path = experiment(task=task, generate=generate, **sections)
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write(json.dumps({"en": LONG, "du": "alt"}) + "\n")
        lines = [json.dumps({"en": source, "du": "neu"}) + "\n" for source in SOURCES]
        (tmp_path / "test.jsonl").write_text("".join(lines))
        config = load_config(path)
        for name in ("prepare", "export_head"):
            PEMA.run(name, config)
        run = Run(config)
        save_adapter(run.bundle.card, run.path("train", "adapter"))
        _write_memory(run)
        return run

    return make


def _write_memory(run: Run) -> None:
    folder, card = run.path("build_memory", "train"), run.bundle.card
    folder.mkdir(parents=True)
    key, count = np.random.default_rng(0).normal(size=(60, card.hidden_size)).astype(np.float32), np.arange(60)
    rows = MemoryRows(encode(key, "float32"), (count % 40 + 40).astype(np.int32), count, np.zeros(60, np.int32))
    size, digest = write_shard(folder / "shard-00000.parquet", rows)
    info = ShardInfo(
        name="shard-00000.parquet", rows=60, examples=60, tokens=60, padded_tokens=60, bytes=size, sha256=digest
    )
    Manifest(
        plm_name=card.name, fingerprint=card.fingerprint, hidden_size=card.hidden_size, vocab_size=card.vocab_size,
        eos_token_id=card.eos_token_ids[0], task="reversed", split="train", context="teacher_forced",
        key_dtype="float32", plan_hash="0" * 16, rows=60, examples=60, shards=(info,),
    ).save(folder)  # fmt: skip


async def offline(run: Run, client) -> tuple[GenerationJob, list[dict[str, Any]]]:
    """The job of `generate` and its rows of `answers.jsonl`."""
    pairs = [replace(pair, example_id=number) for number, pair in enumerate(run.pairs("test"))]
    spec = predictor_of(run)
    job = make_job(run, "pema", pairs, run.prompter(), run.config.generate, spec)
    predictor = spec.load(run.bundle.card, run.bundle.head)
    answers = await offline_answers(client, run.bundle, predictor, job.requests)
    rows = [to_row(run, pair, SystemAnswer("pema", pair.example_id, a, 0.0)) for pair, a in zip(pairs, answers)]
    return job, rows


@pytest.mark.parametrize("name", SETTINGS)
async def test_a_source_is_answered_as_the_offline_stage_answers_it(trained, tiny_client, name: str):
    if name == "neighbours":
        pytest.importorskip("faiss")
    run = await asyncio.to_thread(lambda: trained(**SETTINGS[name]))
    job, rows = await offline(run, tiny_client("llama"))
    args = arguments_of(run.config)
    async with _serving(run, args) as service, httpx.AsyncClient(base_url=service.url, timeout=60) as http:
        builder = service.owner.builders["reversed"]
        for row, request in zip(rows, job.requests, strict=True):
            built = builder.build(row["source"])
            same = {"adapter": "reversed", "explain": False, "stream": 0, "sampling": replace(request.sampling, seed=0)}
            assert built == replace(request, **same)
            body: dict[str, Any] = {"model": "reversed", "source": row["source"], "seed": run.config.seed}
            body["n"] = row["example_id"] + 1 if name == "sampled" else 1  # choice k has the draws of example k
            completion = await _completion(http, body)
            choice = completion["choices"][-1]
            assert choice["text"] == row["answer"]
            assert choice["finish_reason"] == {"eos": "stop"}.get(row["finish"], row["finish"])
            assert completion["usage"]["prompt_tokens"] == len(request.prompt)
            if body["n"] == 1:
                assert completion["usage"]["completion_tokens"] == len(row["tokens"])
            raw = await _completion(http, {**body, "raw": True})
            assert raw["choices"][-1]["text"] == row["raw"]
        await service.until_idle()
    assert all(row["answer"] == f"[{row['raw'].strip()}] of {row['source']}" for row in rows)
    assert _has_effect(name, run, job, rows)


def _has_effect(name: str, run: Run, job: GenerationJob, rows: list[dict[str, Any]]) -> bool:
    """Whether the setting under test shows in the offline answers."""
    lengths, limits = [len(row["tokens"]) for row in rows], {request.max_new_tokens for request in job.requests}
    lams = [{round(token["lam"], 4) for token in row["tokens"]} for row in rows]
    if name.startswith("lambda falls"):
        return max(map(len, lams)) > 2
    if name == "stop strings":
        return any(row["finish"] == "stop" and "e" not in row["raw"] for row in rows)
    if name == "at most 5 tokens":
        return max(lengths) == 5
    if name == "at most half the source":
        return len(limits) > 1
    if "shown" in name:
        bare = [len(run.prompter(0).encode_prompt(row["source"])) for row in rows]
        return all(len(request.prompt) > length for request, length in zip(job.requests, bare, strict=True))
    return True


def _serving(run: Run, args: dict[str, Any]) -> Service:
    return Service(run.config.plm.name or "", args["live"], args["decoder"], max_tokens=None)


async def _completion(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_post_processed_answer_is_streamed_in_its_last_piece(trained):
    run = await asyncio.to_thread(trained)
    args, source = arguments_of(run.config), run.pairs("test")[0].source
    async with _serving(run, args) as service, httpx.AsyncClient(base_url=service.url, timeout=60) as http:
        body = {"model": "reversed", "source": source}
        completion = (await _completion(http, body))["choices"][0]
        raw = (await _completion(http, {**body, "raw": True}))["choices"][0]
        streams = {}
        for is_raw in (False, True):
            streamed = await http.post("/v1/completions", json={**body, "raw": is_raw, "stream": True})
            events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
            assert events.pop() == "[DONE]"
            streams[is_raw] = [json.loads(event)["choices"][0] for event in events]
    texts = {is_raw: [piece["text"] for piece in pieces] for is_raw, pieces in streams.items()}
    assert len(texts[False]) == len(texts[True]) > 2
    assert texts[False] == [""] * (len(texts[False]) - 1) + [completion["text"]] != [""] * len(texts[False])
    assert "".join(texts[True]) == raw["text"] != completion["text"]
    assert len([text for text in texts[True] if text]) > 1  # without rules the text comes token by token
    assert streams[False][-1]["finish_reason"] == streams[True][-1]["finish_reason"] == completion["finish_reason"]


async def test_a_requests_own_settings_override_its_tasks(trained):
    generate = {"decoding": "beam", "beams": 2, "schedule": "linear", "length": 4, "stop": ["zz"]}
    run = await asyncio.to_thread(lambda: trained(generate=generate))
    args, source = arguments_of(run.config), run.pairs("test")[0].source
    async with _serving(run, args) as service, httpx.AsyncClient(base_url=service.url, timeout=60) as http:
        own = {"lambda_max": 0.5, "schedule": "constant", "max_tokens": 6, "temperature": 0, "raw": True}
        body = {"model": "reversed", "source": source, **own, "explain": True}
        (choice,) = (await _completion(http, body))["choices"]
        prompt = run.prompter().encode_prompt(source)
        request = {"model": "reversed", "prompt": prompt, "stop": ["\n", "zz"], **own}
        (expected,) = (await _completion(http, request))["choices"]
    assert choice["text"] == expected["text"]
    assert {token["lambda"] for token in choice["explanation"]} == {0.5}


def test_the_arguments_of_a_service_carry_all_of_generate_and_the_task(trained):
    generate = {"lambda_max": 0.6, "floor": 0.2, "schedule": "linear", "knn": {"weight": 0.3}, "beams": 2, "draft": 3}
    run = trained(generate=generate, task={"shots": 1}, train={"max_train_pairs": 9})
    args = arguments_of(run.config)
    served = args["live"]["tasks"]["reversed"]
    assert GenerateConfig(**served["generate"]) == run.config.generate
    assert served["task"] == run.task.model_dump()
    assert served["shown"] == [{"source": LONG, "target": "alt"}]
    assert (served["memory"], served["max_examples"]) == (str(run.path("build_memory", "train").resolve()), 9)
    assert {name: args["decoder"][name] for name in ("lambda_max", "floor", "schedule")} == {
        "lambda_max": 0.6, "floor": 0.2, "schedule": "linear",
    }  # fmt: skip
    similar = load_config(None, [f"run_dir={run.config.run_dir}", "task.shots=2", "task.show=similar", "task.chat=true",
                                 f"task.name={run.config.task.name}"])  # fmt: skip
    served = arguments_of(similar)["live"]["tasks"]["reversed"]
    assert (served["similar"], served["shots"]) == (str(run.path("prepare", "train.parquet").resolve()), 2)
    assert served["chat"] and "shown" not in served and served["memory"] is None
