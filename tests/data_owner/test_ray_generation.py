"""Answers over Ray Data are those of one process, whatever the batches, and a refusal is one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pema_ray.config import PLMConfig
from pema_ray.data_owner import AdapterConfig, PemaAdapter, UnrollingSchedule
from pema_ray.data_owner.experts import ExpertSpec
from pema_ray.data_owner.generation import Decoding, Generator, Request
from pema_ray.data_owner.ray_generation import Answer, GenerationJob, _Actor, _batches, generate
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import LMHeadBundle

KEYS = [31, 7, 12, 100, 3]
PROMPTS = [[0, 40, 77, 120, 9], [0, 200, 31], [0, 61, 62, 63, 64, 65], [0, 5], [0, 80, 81]]


@pytest.fixture(scope="module")
def bundle(tiny_source, tmp_path_factory) -> Path:
    return tiny_source("llama").lm_head().save(tmp_path_factory.mktemp("head") / "lm_head")


@pytest.fixture(scope="module")
def adapter(tiny_source, tmp_path_factory) -> Path:
    card = tiny_source("llama").describe()
    torch.manual_seed(0)
    made = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint))
    torch.nn.init.normal_(made.B_pd)
    return made.save_pretrained(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def connect(tiny_plm_folder) -> Callable:
    """Makes the tiny PLM; a closure, so that it travels to an actor by value."""
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)

    def make():
        from pema_ray.plm_owner import InProcessPLM, load_plm

        return InProcessPLM(load_plm(config))

    return make


def job(adapter: Path | None, **changes) -> GenerationJob:
    """Five requests, each with a schedule of its own."""
    requests = [
        Request(prompt, 8, UnrollingSchedule(0.9, "linear"), length=3 + place) for place, prompt in enumerate(PROMPTS)
    ]
    made = GenerationJob("pema", KEYS, requests, adapter and ExpertSpec(adapter), Decoding(), explain=True)
    return replace(made, **changes)


def in_process(tiny_source, job: GenerationJob) -> dict[int, list[int]]:
    source = tiny_source("llama")
    bundle = source.lm_head()
    loaded = job.expert and job.expert.load(bundle.card, bundle.head)
    ours = Generator(source, bundle.head, loaded, source.plm.tokenizer.decode, bundle.card.eos_token_ids, job.stop)
    made = [ours.generate([r], job.decoding, streams=[k])[0] for r, k in zip(job.requests, job.keys, strict=True)]
    return {key: answer.tokens for key, answer in zip(job.keys, made, strict=True)}


def told_by_an_actor(connect: Callable, bundle: Path, *jobs: GenerationJob) -> list[tuple[list[Answer], str]]:
    """What one actor says to each job in turn: answers, or a refusal."""
    actor = _Actor(connect, bundle, list(jobs))
    rows = [actor({"number": [number]}) for number in range(len(jobs))]
    return [(pickle.loads(row["answers"][0]), row["error"][0]) for row in rows]


# ── without Ray ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_hold_every_request_with_its_key_and_prompts_of_similar_length(size: int):
    whole, batches = job(None), list(_batches(job(None), size))
    assert [len(batch.keys) for batch in batches][:-1] == [size] * (len(batches) - 1)
    pairs = {key: request for batch in batches for key, request in zip(batch.keys, batch.requests, strict=True)}
    assert pairs == dict(zip(whole.keys, whole.requests, strict=True))
    lengths = [len(request.prompt) for batch in batches for request in batch.requests]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding("sample", temperature=1.5, seed=4)], ids=lambda d: d.kind)
def test_answers_do_not_depend_on_the_batches(tiny_source, bundle, adapter, connect, decoding: Decoding):
    wanted = job(adapter, decoding=decoding)
    expected = in_process(tiny_source, wanted)
    for size in (1, 2, 5):
        told = told_by_an_actor(connect, bundle, *_batches(wanted, size))
        assert {answer.key: answer.generated.tokens for answers, _ in told for answer in answers} == expected


def test_an_actor_turns_every_refusal_into_a_line(bundle, adapter, connect, tmp_path: Path):
    def refuse():
        raise UserError("no such model")

    assert told_by_an_actor(refuse, bundle, job(adapter)) == [([], "no such model")]
    ((_, headless),) = told_by_an_actor(connect, tmp_path / "nothing", job(adapter))
    assert "Run export-head" in headless
    card = LMHeadBundle.load(bundle).card
    long = job(adapter, keys=[1], requests=[replace(job(adapter).requests[0], prompt=[5] * 97)])
    foreign = PemaAdapter(AdapterConfig(card.hidden_size, 8, "huge", "b" * 16)).save_pretrained(tmp_path / "foreign")
    told = told_by_an_actor(connect, bundle, job(tmp_path / "nothing"), long, job(foreign), job(adapter))
    missing, too_long, mismatch, none = (error for _, error in told)
    assert "not an adapter" in missing and "longer than" in too_long
    assert mismatch == str(FingerprintMismatch(f"The adapter {foreign}", f"huge ({'b' * 16})", card.label))
    assert none == "" and len(told[-1][0]) == len(KEYS)  # and it goes on working


# ── on Ray ──────────────────────────────────────────────────────────────────


@pytest.mark.cluster
def test_answers_over_ray_are_those_of_one_process(ray_cluster, tiny_source, bundle, adapter, connect):
    pema, plain = job(adapter), job(None, system="plm")
    told: dict[str, dict[int, Answer]] = {"pema": {}, "plm": {}}
    for batch in generate([pema, plain], connect, bundle, batch_size=2, actors=2, cpus_per_actor=0.5):
        assert 1 <= len(batch) <= 2
        for answer in batch:
            assert answer.key not in told[answer.system] and answer.seconds > 0
            told[answer.system][answer.key] = answer
    for work in (pema, plain):
        expected = in_process(tiny_source, work)
        assert {key: answer.generated.tokens for key, answer in told[work.system].items()} == expected
        traces = [answer.generated.trace for answer in told[work.system].values()]
        assert [trace[0].lam for trace in traces] == pytest.approx([0.9 if work.expert else 0.0] * len(KEYS))
    assert [told["pema"][key].generated.tokens for key in KEYS] != [told["plm"][key].generated.tokens for key in KEYS]


@pytest.mark.cluster
def test_a_refusal_in_an_actor_comes_out_as_itself(ray_cluster, bundle, adapter):
    def refuse():
        from pema_ray.errors import UserError

        raise UserError("no such model")

    with pytest.raises(UserError) as caught:
        list(generate([job(adapter)], refuse, bundle, batch_size=2, cpus_per_actor=0.5))
    assert str(caught.value) == "no such model"
