"""Answers over Ray Data are those of one decoder, whatever the tasks and batches, and a refusal is one line."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from decoding_kit import BEAM, GREEDY, attributions, ids_of, make_adapter

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.decoding import Decoder, GenerationRequest, PredictorSpec, SamplingParams
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer, _Actor, _split, generate
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, LMHeadBundle
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LocalPLM

KEYS = [31, 7, 12, 100, 3]
PROMPTS = [[0, 40, 77, 120, 9], [0, 200, 31], [0, 61, 62, 63, 64, 65], [0, 5], [0, 80, 81]]


@pytest.fixture(scope="module")
def bundle(tiny_source, tmp_path_factory) -> Path:
    return tiny_source("llama").lm_head().save(tmp_path_factory.mktemp("head") / "lm_head")


@pytest.fixture(scope="module")
def adapter(tiny_plm, tmp_path_factory) -> Path:
    return make_adapter(tiny_plm("llama")).save_pretrained(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def connect(tiny_plm_folder) -> Callable:
    """Makes a client of the tiny PLM; a closure, so that it travels to an actor by value."""
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)

    def make():
        from pema_ray.plm_owner import LocalPLM

        return LocalPLM(config)

    return make


def job(adapter: Path | None, sampling: SamplingParams = GREEDY, **changes) -> GenerationJob:
    """Five requests, each with a schedule of its own."""
    named = "mine" if adapter else None
    requests = [
        GenerationRequest(prompt, 8, UnrollingSchedule(0.9, "linear"), named, 3 + n, sampling, explain=True, stream=n)
        for n, prompt in enumerate(PROMPTS)
    ]
    return replace(GenerationJob("pema", KEYS, requests, adapter and PredictorSpec(adapter)), **changes)


async def _by_one_decoder(plm, job: GenerationJob) -> dict[int, list[int]]:
    client = LocalPLM(plm)
    bundle = await client.lm_head()
    decoder = Decoder(client, bundle.head, bundle.tokenizer(), bundle.card.eos_token_ids, 8, lockstep=True)
    if job.predictor is not None:
        decoder.predictors = {"mine": job.predictor.load(bundle.card, bundle.head)}
    answers = await decoder.generate(job.requests)
    await decoder.stop()
    await client.end()
    return dict(zip(job.keys, ids_of(answers), strict=True))


def by_one_decoder(tiny_plm, job: GenerationJob) -> dict[int, list[int]]:
    return asyncio.run(_by_one_decoder(tiny_plm("llama"), job))


def by_an_actor(
    connect: Callable, bundle: Path, *jobs: GenerationJob, batch_size: int = 2
) -> list[tuple[list[SystemAnswer], str]]:
    """One actor's answers, or its error, for each job in turn."""
    actor = _Actor(connect, bundle, list(jobs), batch_size, device="cpu")
    rows = [actor({"number": [number]}) for number in range(len(jobs))]
    return [(pickle.loads(row["answers"][0]), row["error"][0]) for row in rows]


# ── without Ray ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_tasks_hold_every_request_with_its_key_and_prompts_of_similar_length(size: int, monkeypatch):
    monkeypatch.setattr("pema_ray.data_owner.decoding.offline._BATCHES_PER_TASK", 1)
    undivided, tasks = job(None), list(_split(job(None), size))
    assert [len(task.keys) for task in tasks][:-1] == [size] * (len(tasks) - 1)
    pairs = {key: request for task in tasks for key, request in zip(task.keys, task.requests, strict=True)}
    assert pairs == dict(zip(undivided.keys, undivided.requests, strict=True))
    lengths = [len(request.prompt) for task in tasks for request in task.requests]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams("sample", temperature=1.5, seed=4), BEAM], ids=lambda s: s.kind
)
def test_answers_depend_on_neither_tasks_nor_batches(tiny_plm, bundle, adapter, connect, sampling, monkeypatch):
    requested = job(adapter, sampling)
    expected = by_one_decoder(tiny_plm, requested)
    for size in (1, 2, 5):
        monkeypatch.setattr("pema_ray.data_owner.decoding.offline._BATCHES_PER_TASK", 3 - size // 2)
        results = by_an_actor(connect, bundle, *_split(requested, size), batch_size=size)
        assert [error for _, error in results if error] == []
        assert {answer.key: answer.answer.ids for answers, _ in results for answer in answers} == expected


def test_an_actor_turns_every_refusal_into_a_line(bundle, adapter, connect, tmp_path: Path):
    def refuse():
        raise UserError("no such model")

    assert by_an_actor(refuse, bundle, job(adapter)) == [([], "no such model")]
    ((_, headless),) = by_an_actor(connect, tmp_path / "nothing", job(adapter))
    assert "Run export-head" in headless
    card = LMHeadBundle.load(bundle).card
    long = job(adapter, keys=[1], requests=[replace(job(adapter).requests[0], prompt=[5] * 97)])
    foreign = PemaAdapter(AdapterConfig(card.hidden_size, 8, "huge", "b" * 16)).save_pretrained(tmp_path / "foreign")
    results = by_an_actor(connect, bundle, job(tmp_path / "nothing"), long, job(foreign), job(adapter))
    missing, too_long, mismatch, none = (error for _, error in results)
    assert "not an adapter" in missing and "longer than" in too_long
    assert mismatch == str(FingerprintMismatch(f"The adapter {foreign}", f"huge ({'b' * 16})", card.label))
    assert none == "" and len(results[-1][0]) == len(KEYS)  # and it continues


def test_a_plm_owner_that_stays_busy_is_a_line_too(bundle, adapter, connect, monkeypatch):
    monkeypatch.setattr(Decoder.generate, "__defaults__", (0.3,))

    def busy():
        client = connect()

        async def step(steps):
            raise Busy("the quota is used up", 0.1)

        client.step = step
        return client

    ((answers, error),) = by_an_actor(busy, bundle, job(adapter))
    assert answers == [] and error == "the PLM owner did not answer in time: the quota is used up"


# ── on Ray ──────────────────────────────────────────────────────────────────


@pytest.mark.cluster
def test_answers_over_ray_are_those_of_one_decoder(ray_cluster, tiny_plm, bundle, adapter, connect):
    pema, plain = job(adapter), job(None, system="plm")
    answers_of: dict[str, dict[int, SystemAnswer]] = {"pema": {}, "plm": {}}
    for answers in generate([pema, plain], connect, bundle, batch_size=2, actors=2, cpus_per_actor=0.5, device="cpu"):
        for answer in answers:
            assert answer.key not in answers_of[answer.system] and answer.seconds > 0
            answers_of[answer.system][answer.key] = answer
    for work in (pema, plain):
        answered = answers_of[work.system]
        assert {key: answer.answer.ids for key, answer in answered.items()} == by_one_decoder(tiny_plm, work)
        first_lambdas = [attributions(answer.answer)[0].lam for answer in answered.values()]
        assert first_lambdas == pytest.approx([0.9 if work.predictor else 0.0] * len(KEYS))
    assert [answers_of["pema"][key].answer.ids for key in KEYS] != [answers_of["plm"][key].answer.ids for key in KEYS]


@pytest.mark.cluster
def test_a_refusal_in_an_actor_comes_out_as_itself(ray_cluster, bundle, adapter):
    def refuse():
        from pema_ray.errors import UserError

        raise UserError("no such model")

    with pytest.raises(UserError) as caught:
        list(generate([job(adapter)], refuse, bundle, batch_size=2, cpus_per_actor=0.5))
    assert str(caught.value) == "no such model"
