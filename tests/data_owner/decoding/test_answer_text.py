"""Streamed text equals the complete text and never shows part of a stop string."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from decoding_kit import answers, make_adapter, requests
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.decoding import GenerationRequest, Predictor
from pema_ray.data_owner.decoding.text import AnswerText
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.line import LMHead
from pema_ray.line.tokenizer import PLMTokenizer

END, BEGIN_BYTES = 0, 3
STOPS = st.lists(st.text("abé日", min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def by_bytes() -> PLMTokenizer:
    """A tokenizer with byte fallback whose tokens are `<end>`, a word, its piece, and every single byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": END, "▁abc": 1, "b": 2} | {f"<0x{byte:02X}>": BEGIN_BYTES + byte for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken("<end>", special=True)])
    return PLMTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>"))


def bytes_of(text: str) -> list[int]:
    return [BEGIN_BYTES + byte for byte in text.encode()]


def pushed(text: AnswerText, tokens: Sequence[int]) -> list[str]:
    return [text.push(token) for token in tokens]


# ── pieces and the whole ────────────────────────────────────────────────────


@given(text=st.text(alphabet="abé日🙂 \n", max_size=30), stops=STOPS)
def test_pieces_make_the_whole_up_to_the_first_stop(by_bytes, text: str, stops: list[str]):
    stream, shown = AnswerText(by_bytes, stops), ""
    for token in bytes_of(text):
        shown += stream.push(token)
        assert not any(stop in shown for stop in stops)
        assert "\ufffd" not in shown
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stream.stopped == bool(ends)
    assert shown in [text[:at] for at in ends] if ends else shown == text  # the first complete stop ends it


@given(tokens=st.lists(st.integers(0, 258), max_size=40), seed=st.integers(0, 2**16))
def test_streamed_text_is_the_whole_text_of_any_tokens(by_bytes, tokens: list[int], seed: int):
    """Including broken UTF-8 and special tokens, and for a fork at any position."""
    stream, at = AnswerText(by_bytes), seed % (len(tokens) + 1)
    streamed = "".join(pushed(stream, tokens[:at]))
    fork, forked = stream.fork(), streamed
    for text in (stream, fork):
        complete = streamed + "".join(pushed(text, tokens[at:])) + text.finish()
        assert complete == by_bytes.decode(tokens)
    assert forked == streamed


async def test_an_answer_of_single_bytes_streams_whole_characters(tiny_client, tiny_plm, by_bytes):
    """Byte fallback: a character takes four tokens, offline and served."""
    from pema_ray.data_owner.decoding import Answer, Decoder

    client, spoken = tiny_client("llama"), [*bytes_of("a🙂é"), 1, *bytes_of("日")[:2], END]
    head = (await client.lm_head()).head
    for lockstep in (True, False):
        decoder = Decoder(client, head, by_bytes, [END], lockstep=lockstep)
        decoder.predictors = {"mine": Scripted(head, spoken)}
        tokens = [token async for token in decoder.answer(replace(requests(1.0)[0], max_new_tokens=20))]
        await decoder.stop()
        assert [token.id for token in tokens] == spoken
        assert [token.text for token in tokens] == ["a", "", "", "", "🙂", "", "é", " abc", "", "", "\ufffd"]
        assert Answer(tokens).text == by_bytes.decode(spoken[:-1])


def test_text_is_emitted_as_soon_as_it_cannot_change(by_bytes):
    stream = AnswerText(by_bytes, ["END"])
    assert pushed(stream, bytes_of("abE")) == ["a", "b", ""]
    assert pushed(stream, bytes_of("xé")) == ["Ex", "", "é"]
    assert pushed(stream, bytes_of("EN")) == ["", ""]
    assert stream.finish() == "EN"


def test_a_stop_string_may_begin_within_another_that_does_not_come(by_bytes):
    stream = AnswerText(by_bytes, ["abac", "ba"])
    assert pushed(stream, bytes_of("xab")) == ["x", "", ""]
    assert pushed(stream, bytes_of("b")) == ["ab"]
    assert pushed(stream, bytes_of("a")) == [""]
    assert stream.stopped and stream.finish() == ""


def test_a_special_token_works_as_a_stop_string(by_bytes):
    stream = AnswerText(by_bytes, ["<end>", "abcd"])
    assert pushed(stream, bytes_of("abc")) == ["", "", ""]
    assert not stream.stopped
    assert (stream.push(END), stream.stopped, stream.finish()) == ("abc", True, "")
    hidden = AnswerText(by_bytes, ["abcd"])
    assert (hidden.push(END), hidden.stopped) == ("", False)  # otherwise it has no text


# ── in answers ──────────────────────────────────────────────────────────────


class Scripted(Predictor):
    """Predicts the given tokens, whatever the PLM's states are."""

    def __init__(self, head: LMHead, tokens: Sequence[int]) -> None:
        self.head, self.adapter, self.neighbours = head, None, None
        self._tokens = list(tokens)

    def distribution(self, state_NH, decoding):
        log_p_NV = torch.full((len(state_NH), self.head.vocab_size), -30.0)
        for row in range(len(state_NH)):
            log_p_NV[row, self._tokens.pop(0)] = 0.0
        return log_p_NV, torch.ones(len(state_NH))


async def say(client, text: str | list[int], stop: tuple[str, ...], lockstep: bool):
    """An answer that says this, up to a stop string."""
    bundle = await client.lm_head()
    tokenizer = bundle.tokenizer()
    tokens = tokenizer.encode(text, special_tokens=False) if isinstance(text, str) else text
    request = GenerationRequest([0, 5], len(tokens), UnrollingSchedule(1.0), "mine", stop=stop)
    (answer,) = await answers(client, [request], {"mine": Scripted(bundle.head, tokens)}, lockstep=lockstep)
    return answer


@pytest.mark.parametrize("lockstep", [True, False], ids=["offline", "served"])
async def test_an_answer_that_begins_with_a_newline_is_not_empty(tiny_client, lockstep: bool):
    answer = await say(tiny_client("llama"), "\n\nab\nc", ("\n",), lockstep)
    assert (answer.text, answer.finish) == ("\n\nab", "stop")


@pytest.mark.parametrize("lockstep", [True, False], ids=["offline", "served"])
async def test_eos_has_no_text_and_a_special_token_can_stop_an_answer(tiny_client, lockstep: bool):
    client = tiny_client("llama")
    tokenizer = (await client.lm_head()).tokenizer()
    a, pad, eos = tokenizer.encode("a", special_tokens=False)[0], tokenizer.special_id("<pad>"), 1
    ended = await say(client, [a, a, eos], (), lockstep)
    assert (ended.text, ended.finish, ended.ids) == ("aa", "eos", [a, a, eos])
    stopped = await say(client, [a, pad, a], ("<pad>",), lockstep)
    assert (stopped.text, stopped.finish, stopped.ids) == ("a", "stop", [a, pad])
    unstopped = await say(client, [a, pad, a], (), lockstep)
    assert (unstopped.text, unstopped.finish) == ("aa", "length")


async def test_text_that_is_held_back_comes_with_the_last_token(tiny_client, tiny_plm):
    client, adapter = tiny_client("llama"), make_adapter(tiny_plm("llama"))
    free = await answers(client, requests(), adapter, eos=[])
    requested = [replace(r, stop=(f.text[-2:] + "never",)) for r, f in zip(requests(), free, strict=True)]
    for lockstep in (True, False):
        answered = await answers(client, requested, adapter, eos=[], lockstep=lockstep)
        assert [(a.text, a.finish) for a in answered] == [(f.text, "length") for f in free]


# ── cost ────────────────────────────────────────────────────────────────────


def _operations(tokenizer: PLMTokenizer, tokens: Sequence[int]) -> tuple[int, int]:
    """Function calls (Python's and C's) of pushing tokens, and characters and items kept at the end."""
    text, calls = AnswerText(tokenizer, ["\nOld:", "b\nb"]), [0]

    def count(frame, event: str, argument) -> None:
        calls[0] += event in ("call", "c_call")

    profiler = sys.getprofile()
    sys.setprofile(count)
    try:
        pushed(text, tokens)
    finally:
        sys.setprofile(profiler)
    return calls[0], sum(len(value) for value in vars(text).values() if hasattr(value, "__len__"))


@pytest.mark.parametrize("spoken", ["ab 🙂\n", "\n "], ids=["words", "white space alone"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(by_bytes, spoken: str):
    tokens = bytes_of(spoken) * (4000 // len(bytes_of(spoken)))
    _operations(by_bytes, tokens[:10])  # spells every token once
    few, few_kept = _operations(by_bytes, tokens[: len(tokens) // 4])
    many, many_kept = _operations(by_bytes, tokens)
    assert many <= 4.1 * few
    assert many_kept <= few_kept + 8  # the state does not grow, so no operation can become slower
