"""Requests of stages and of the service: the same prompts, schedules and limits from the same settings."""

from __future__ import annotations

import pytest

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding import SamplingParams
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.tasks import Prompter, Task

SOURCE = "And he said unto them, Go ye and tell the people what ye have seen."


@pytest.fixture
def prompter(tokenizer) -> Prompter:
    return Prompter(PLMTokenizer(tokenizer), Task(name="t", template="Old: {source}\nModern: ", stop=("\n",)))


def builder(prompter: Prompter, max_tokens: int = 1000, adapter: str | None = "mine", **options) -> RequestBuilder:
    return RequestBuilder(prompter, GenerateConfig(**options), adapter, max_tokens, seed=7)


def test_a_request_is_what_the_settings_say(prompter):
    options = {"decoding": "beam", "beams": 3, "stop": ("Old:",), "draft": 2, "lambda_max": 0.8, "schedule": "linear"}
    request = builder(prompter, **options, floor=0.1, length_penalty=0.5).build(SOURCE, 12)
    assert request.prompt == prompter.encode_prompt(SOURCE)
    assert request.schedule == UnrollingSchedule(0.8, "linear", 0.1)
    assert request.sampling == SamplingParams("beam", beams=3, length_penalty=0.5, seed=7)
    assert (request.stop, request.draft, request.stream, request.adapter) == (("\n", "Old:"), 2, 12, "mine")
    assert builder(prompter).build(SOURCE, 1, explain=True, max_new_tokens=5).max_new_tokens == 5


def test_the_plm_alone_has_lambda_0(prompter):
    request = builder(prompter, adapter=None, lambda_max=0.9).build(SOURCE)
    assert request.adapter is None and request.schedule.at(0, 1) == 0.0


def test_the_answer_is_limited_by_each_of_three(prompter):
    prompt = len(prompter.encode_prompt(SOURCE))
    source = len(prompter.tokenizer.encode(SOURCE, special_tokens=False))
    limits = {"max_new_tokens": 1000, "max_new_ratio": 1.5}
    assert builder(prompter, **limits).build(SOURCE).max_new_tokens == int(1.5 * source) + 16
    assert builder(prompter, max_new_tokens=9).build(SOURCE).max_new_tokens == 9
    assert builder(prompter, prompt + 4, **limits).build(SOURCE).max_new_tokens == 4


def test_a_prompt_that_leaves_no_room_is_refused(prompter):
    prompt = len(prompter.encode_prompt(SOURCE))
    with pytest.raises(UserError, match=f"Example 3: its prompt has {prompt} tokens; the PLM owner allows {prompt}"):
        builder(prompter, prompt).build(SOURCE, 3)


@pytest.mark.parametrize("length", ["prompt", "source", "reference", 31])
def test_lambda_falls_over_the_length_that_is_asked_for(prompter, length: str | int):
    def tokens(text: str) -> int:
        return len(prompter.tokenizer.encode(text, special_tokens=False))

    prompt, reference = len(prompter.encode_prompt(SOURCE)), "Go and tell the people."
    expected = {"prompt": prompt, "source": tokens(SOURCE), "reference": prompt + tokens(reference), 31: 31}
    assert builder(prompter, length=length).build(SOURCE, 0, reference).length == expected[length]
    assert builder(prompter, length="source").build("").length == 1  # never over nothing
