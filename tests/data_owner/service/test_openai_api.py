"""OpenAI's own client works unchanged with the API, over real HTTP; errors arrive as its exceptions."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from api_kit import save_adapter

from pema_ray.data_owner.service.api import _tokenized
from pema_ray.data_owner.service.forms import Completion
from pema_ray.data_owner.service.protocol import CompletionRequest
from pema_ray.errors import FingerprintMismatch, UserError


async def test_models_are_adapters_and_the_plm_alone(service):
    listed = [model.id for model in (await service.client.models.list()).data]
    assert listed == ["modern", "formal", service.owner.card.name]
    assert (await service.client.models.retrieve("formal")).owned_by == "data-owner"
    with pytest.raises(openai.NotFoundError, match="no model 'modem'.*Did you mean 'modern'"):
        await service.client.models.retrieve("modem")


async def test_one_request_is_tokenised_at_a_time_even_if_a_client_disconnects(service):
    """A thread cannot be cancelled: the next request waits for it."""
    tokenizer, running, most_running, entered = service.owner.tokenizer, 0, 0, threading.Event()

    class Slow:
        def encode(self, text: str) -> list[int]:
            nonlocal running, most_running
            running += 1
            most_running = max(most_running, running)
            entered.set()
            time.sleep(0.2)
            running -= 1
            return tokenizer.encode(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    service.owner.tokenizer = Slow()
    form = CompletionRequest(model="modern", prompt="Rewrite each", max_tokens=2)
    disconnected = asyncio.create_task(_tokenized(service.owner, Completion, form))
    await asyncio.to_thread(entered.wait)
    disconnected.cancel()
    with pytest.raises(asyncio.CancelledError):
        await disconnected
    await asyncio.gather(*(_tokenized(service.owner, Completion, form) for _ in range(2)))
    assert most_running == 1


async def test_a_streamed_completion_equals_the_whole_one(service):
    request = {"model": "modern", "prompt": "Rewrite each", "max_tokens": 20, "temperature": 0}
    completion = await service.client.completions.create(**request, logprobs=2)
    (choice,) = completion.choices
    assert completion.object == "text_completion"
    assert choice.finish_reason in ("length", "stop")
    prompt = len(service.owner.tokenizer.encode("Rewrite each"))
    assert completion.usage.prompt_tokens == prompt
    assert completion.usage.completion_tokens == len(choice.logprobs.tokens) <= 20
    assert all(p <= 0 for p in choice.logprobs.token_logprobs)
    for token, p, top in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs):
        assert top[token] == p == max(top.values())
    stream = await service.client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    pieces = [piece async for piece in stream]
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == choice.text
    assert pieces[-1].usage == completion.usage
    assert [p.choices[0].finish_reason for p in pieces[:-1]][-1] == choice.finish_reason
    assert {piece.id for piece in pieces} == {pieces[0].id} != {completion.id}


async def test_chat_uses_the_models_template_and_returns_log_probabilities(service, tokenizer):
    request = {
        "model": "modern",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rewrite"}],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    completion = await service.client.chat.completions.create(**request)
    text = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    assert completion.usage.prompt_tokens == len(prompt)
    raw = await service.client.completions.create(model="modern", prompt=prompt, max_tokens=8, temperature=0)
    assert completion.choices[0].message.content == raw.choices[0].text
    assert completion.choices[0].message.role == "assistant"
    for token in completion.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
    stream = await service.client.chat.completions.create(**request, stream=True)
    deltas = [piece.choices[0].delta async for piece in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content for delta in deltas) == completion.choices[0].message.content


async def test_several_prompts_and_several_answers_to_each(service):
    many = await service.client.completions.create(
        model="formal", prompt=["Rewrite", "Formal"], n=2, max_tokens=5, temperature=1, seed=3
    )
    repeated = await service.client.completions.create(
        model="formal", prompt=["Rewrite", "Formal"], n=2, max_tokens=5, temperature=1, seed=3
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [c.text for c in many.choices] == [c.text for c in repeated.choices]
    assert many.choices[0].text != many.choices[1].text
    other_seed = await service.client.completions.create(model="formal", prompt="Rewrite", max_tokens=5, seed=4)
    assert other_seed.choices[0].text != many.choices[0].text


async def test_a_temperature_near_zero_is_greedy(service):
    request = {"model": "modern", "prompt": "Rewrite each", "max_tokens": 10}
    greedy = await service.client.completions.create(**request, temperature=0)
    assert (await service.client.completions.create(**request, temperature=1e-50)).choices == greedy.choices


async def test_a_stop_string_ends_an_answer_before_itself(service):
    request = {"model": "modern", "prompt": "Rewrite each", "max_tokens": 30, "temperature": 0}
    unstopped = (await service.client.completions.create(**request)).choices[0].text
    stop = unstopped[len(unstopped) // 2 :][:2]
    cut = await service.client.completions.create(**request, stop=[stop, "never said"])
    assert cut.choices[0].text == unstopped[: unstopped.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    stream = await service.client.completions.create(**request, stop=stop, stream=True)
    assert "".join([piece.choices[0].text async for piece in stream]) == unstopped[: unstopped.index(stop)]


async def test_the_extra_body_sets_lambda_and_requests_explanations(service):
    request = {"prompt": "Rewrite each", "max_tokens": 6, "temperature": 0}
    plm = await service.client.completions.create(model=service.owner.card.name, **request)
    zero = await service.client.completions.create(model="modern", **request, extra_body={"lambda_max": 0})
    assert zero.choices[0].text == plm.choices[0].text
    extra_body = {"lambda_max": 1.0, "schedule": "linear", "length": 3, "floor": 0.2, "explain": True, "draft": 0}
    explained = await service.client.completions.create(model="modern", **request, extra_body=extra_body)
    explanation = explained.choices[0].explanation
    lams = [entry["lambda"] for entry in explanation]
    assert lams[:4] == pytest.approx([1.0, 0.2 + 0.8 * 2 / 3, 0.2 + 0.8 / 3, 0.2][: len(lams)])
    assert {entry["decided_by"] for entry in explanation} <= {"pema", "plm"}
    assert all(len(entry["top_pema"]) == len(entry["top_plm"]) == 5 for entry in explanation)
    assert all(math.isfinite(entry["logprob_plm"]) for entry in explanation)


async def test_a_source_becomes_a_prompt_of_the_adapters_task(service):
    request = {"model": "modern", "max_tokens": 8, "temperature": 0}
    by_source = await service.client.completions.create(prompt="", **request, extra_body={"source": "the {source}"})
    by_prompt = await service.client.completions.create(prompt="Rewrite: the {source}\nModern:", **request, stop="\n\n")
    assert by_source.choices[0].text == by_prompt.choices[0].text
    assert by_source.usage == by_prompt.usage
    with pytest.raises(openai.BadRequestError, match="'formal' has no task"):
        await service.client.completions.create(**{**request, "model": "formal"}, prompt="", extra_body={"source": "x"})
    with pytest.raises(openai.BadRequestError, match="and not both"):
        await service.client.completions.create(**request, prompt="x", extra_body={"source": "x"})
    async with httpx.AsyncClient(base_url=service.url) as http:
        assert (await http.get("/playground/models")).json()["models"] == ["modern"]
        assert "<html" in (await http.get("/playground")).text


async def test_a_client_that_disconnects_frees_its_slot(service):
    stream = await service.client.completions.create(model="modern", prompt="Rewrite", max_tokens=60, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await service.until_idle()


async def test_adapters_are_swapped_while_answers_stream(service, tmp_path):
    request = {"model": "modern", "prompt": "Rewrite each", "max_tokens": 30, "temperature": 0}
    expected = (await service.client.completions.create(**request)).choices[0].text
    stream = await service.client.completions.create(**request, stream=True)
    first = await anext(aiter(stream))
    save_adapter(service.owner.card, tmp_path / "newer", seed=9)
    await service.owner.change({"adapters": {"modern": str(tmp_path / "newer")}})
    rest = "".join([piece.choices[0].text async for piece in stream])
    assert first.choices[0].text + rest == expected
    assert (await service.client.completions.create(**request)).choices[0].text != expected
    with pytest.raises(openai.NotFoundError):
        await service.client.completions.create(**{**request, "model": "formal"})


async def test_a_rejected_change_changes_nothing(service, tmp_path):
    predictors, builders = dict(service.owner.decoder.predictors), dict(service.owner.builders)
    foreign = str(tmp_path / "foreign")
    save_adapter(replace(service.owner.card, name="another PLM", fingerprint="0" * 16), tmp_path / "foreign")
    for folders, error in (
        ({"modern": foreign}, FingerprintMismatch),
        ({"modern": str(tmp_path / "nowhere")}, UserError),
        ({service.owner.card.name: foreign}, UserError),
    ):
        with pytest.raises(error):
            await service.owner.change({"adapters": folders})
        assert service.owner.decoder.predictors == predictors
        assert service.owner.builders == builders


WRONG = [
    ({"model": "nobody"}, 404, "no model 'nobody'"),
    ({"prompt": ""}, 400, "none of them empty"),
    ({"prompt": [1, 99999]}, 400, "99999 is no token"),
    ({"prompt": [-1]}, 400, "-1 is no token"),
    ({"prompt": "Rewrite " * 60}, 400, "tokens and 5 more are requested; prompt and answer together may have 80"),
    ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "5000 more are requested"),
    ({"n": 10**9}, 400, "n: Input should be less than or equal to 16"),
    ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
    ({"top_p": 0}, 400, "top_p: "),
    ({"lambda_max": -0.1}, 400, "lambda_max: Input should be greater than or equal to 0"),
    ({"lambda_max": 0.2, "floor": 0.5, "schedule": "linear"}, 400, "floor=0.5 lies above"),
    ({"stop": ["a"] * 5}, 400, "at most four stop strings"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"echo": True}, 400, "echo"),
    ({"prompt": ["Rewrite"] * 9, "n": 8}, 400, "at most 64 answers"),
    ({"prompt": "x" * (2 << 20)}, 413, "longer than 2 MiB"),
    ({"draft": 17}, 400, "draft: Input should be less than or equal to 16"),
    ({"lamda_max": 0.5}, 400, "lamda_max: Extra inputs are not permitted"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_invalid_requests_are_rejected_by_name(service, stream):
    async with httpx.AsyncClient(base_url=service.url) as http:
        for change, status, words in WRONG:
            request = {"model": "modern", "prompt": "Rewrite", "max_tokens": 5, "stream": stream} | change
            response = await http.post("/v1/completions", json=request)
            assert response.status_code == status, (change, response.text)
            error = response.json()["error"]
            assert words in error["message"], (change, error)
            assert error["type"] == "invalid_request_error"
        nan = '{"model": "modern", "prompt": "x", "lambda_max": NaN}'
        for content, words in ((nan, "lambda_max"), ("{", "JSON"), ("[]", "dictionary"), ("", "")):
            response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 400, content
            assert words in response.json()["error"]["message"]


async def test_an_unreachable_plm_owner_is_a_503_with_retry_after(service):
    service.owner.timeout_seconds = 0.5
    service.handle.kill("r0")
    with pytest.raises(openai.InternalServerError) as raised:
        await service.client.completions.create(model="modern", prompt="Rewrite", max_tokens=5)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.InternalServerError):
        await service.client.completions.create(model="modern", prompt="Rewrite", max_tokens=5, stream=True)
