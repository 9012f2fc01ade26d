"""Frames decode to what was encoded; anything else is refused by name, before memory is allocated."""

from __future__ import annotations

import pickle
import struct
from contextlib import suppress

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped, codec
from pema_ray.line.codec import BadFrame
from pema_ray.line.prefix import Prefix, PrefixShape
from pema_ray.line.protocol import PrefixLost

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
HANDLES = st.text("0123456789abcdef", max_size=64)
DECODERS = {
    "extract": codec.decode_extract,
    "steps": codec.decode_steps,
    "rows": codec.decode_rows,
    "stepped": lambda data: codec.decode_stepped(data, UserError),
    "files": codec.decode_files,
    "gradient": codec.decode_gradient,
    "text": codec.decode_text,
    "prefix": codec.decode_prefix,
}
SHAPE = PrefixShape(2, 1, 4)
VERSION = codec.encode_rows(torch.zeros(1, 1))[4]
GOOD = {
    "extract": codec.encode_extract(ExtractBatch([[1, 2, 3], [4]], [1, 0], (7, 8)), "f" * 16),
    "steps": codec.encode_steps([Step("a", 0, [1, 2, 3], 2), Step("b", 7, [4], draft=3)], "f" * 16),
    "rows": codec.encode_rows(torch.arange(6.0).reshape(2, 3)),
    "stepped": codec.encode_stepped([Stepped(torch.ones(2, 3), (5,)), SessionLost("b"), Busy("full", 2.0)]),
    "files": codec.encode_files({"a.json": b"{}", "tokenizer/b": b"\0\1"}),
    "gradient": codec.encode_gradient(
        ExtractBatch([[1, 2, 3], [4]], [1, 0], (7,), "h" * 64), torch.ones(3, 2), "f" * 16
    ),
    "text": codec.encode_text([5, 6], "f" * 16),
    "prefix": codec.encode_prefix(Prefix(torch.ones(3, SHAPE.width), SHAPE, 1, (7, 8, 9)), "f" * 16),
}


def framed_bytes(header: bytes) -> bytes:
    return struct.pack("<4sBI", b"PEMA", VERSION, len(header)) + header


def frame_of(header: dict, tokens: int = 0) -> bytes:
    return framed_bytes(msgspec.msgpack.encode(header)) + np.arange(tokens, dtype="<i4").tobytes()


@given(sequences=st.lists(IDS, min_size=1, max_size=5), prefix=IDS | st.just([]), name=st.text(), data=st.data())
def test_a_batch_arrives_as_it_was_sent(sequences, prefix, name, data):
    first = [data.draw(st.integers(0, len(ids) - 1)) for ids in sequences]
    batch = ExtractBatch(sequences, first, tuple(prefix), data.draw(HANDLES))
    assert codec.decode_extract(codec.encode_extract(batch, name)) == (batch, name)


@given(data=st.data(), names=st.lists(st.text(min_size=1, max_size=200), unique=True, max_size=4), plm=st.text())
def test_steps_arrive_as_they_were_sent(data, names, plm):
    steps = []
    for name in names:
        tokens = data.draw(IDS)
        position, states = data.draw(st.integers(0, 2**40)), data.draw(st.integers(1, len(tokens)))
        draft, waits = data.draw(st.integers(0, 99)), data.draw(st.booleans())
        steps.append(Step(name, position, tokens, states, draft, waits, data.draw(HANDLES)))
    assert codec.decode_steps(codec.encode_steps(steps, plm)) == (steps, plm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_arrive_bit_for_bit(dtype):
    rows = torch.randn(5, 7).to(dtype)
    rows[0, 0], rows[1, 1] = float("nan"), float("-inf")
    received = codec.decode_rows(codec.encode_rows(rows))
    assert received.dtype == dtype
    assert torch.equal(received.view(torch.uint8), rows.view(torch.uint8))
    received += 1  # it is writable


def test_outcomes_arrive_with_their_errors():
    sent = [Stepped(torch.randn(2, 4), (7, 8)), SessionLost("x"), Busy("full", 2.5), UserError("too long"),
            PrefixLost("h"), Stepped(torch.randn(1, 4))]  # fmt: skip
    first, lost, busy, refused, prefix_lost, last = codec.decode_stepped(codec.encode_stepped(sent), UserError)
    assert isinstance(first, Stepped) and torch.equal(first.state_NH, sent[0].state_NH) and first.drafted == (7, 8)
    assert isinstance(last, Stepped) and torch.equal(last.state_NH, sent[5].state_NH)
    assert isinstance(prefix_lost, PrefixLost)
    assert isinstance(lost, SessionLost)
    assert isinstance(busy, Busy) and busy.retry_after == 2.5
    assert isinstance(refused, UserError) and str(refused) == "too long"
    assert [type(o) for o in codec.decode_stepped(codec.encode_stepped([SessionLost("x")]), UserError)] == [SessionLost]


def test_files_arrive_and_never_lead_out_of_their_folder():
    files = {"bundle.json": b"{}", "tokenizer/vocab.txt": bytes(range(256)), "empty": b""}
    assert codec.decode_files(codec.encode_files(files)) == files
    for name in ("../a", "/etc/passwd", "a/../../b", "", "a//b", "a\\b", "."):
        with pytest.raises(BadFrame, match="no name of a file|names"):
            codec.decode_files(codec.encode_files({name: b"x"}))


@pytest.mark.parametrize("kind", DECODERS)
def test_frames_of_another_kind_are_refused(kind):
    for frame_kind, frame in GOOD.items():
        if frame_kind == kind:
            DECODERS[kind](frame)
        else:
            with pytest.raises(BadFrame):
                DECODERS[kind](frame)


@settings(max_examples=400)
@given(data=st.data(), kind=st.sampled_from(sorted(GOOD)))
def test_damaged_frames_are_refused_by_name_or_still_make_sense(data, kind):
    frame = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        frame[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    for damaged in (bytes(frame), bytes(frame[:cut]), bytes(frame) + b"x"):
        with suppress(BadFrame):
            DECODERS[kind](damaged)


@settings(max_examples=300)
@given(noise=st.binary(max_size=200), kind=st.sampled_from(sorted(GOOD)), framed=st.booleans())
def test_noise_is_refused_by_name(noise, kind, framed):
    with pytest.raises(BadFrame):
        DECODERS[kind](framed_bytes(noise) if framed else noise)


class Exploding:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_pickle_is_bytes_like_any_other(kind):
    with pytest.raises(BadFrame, match="do not begin"):
        DECODERS[kind](pickle.dumps(Exploding()))


def test_promised_sizes_are_checked_before_memory_is_taken():
    frame = GOOD["rows"]
    grown = frame.replace(b"\x92\x02\x03", b"\x92\x7f\x7f")
    assert grown != frame
    with pytest.raises(BadFrame, match=r"should have 64516 bytes, 24 are left"):
        codec.decode_rows(grown)


def test_shapes_that_no_array_can_have_are_refused():
    for shape in ([2**63, 0], [2**31], [-1, 4], [1, 2, 3]):
        with pytest.raises(BadFrame, match="has shape|should have|header"):
            codec.decode_rows(frame_of({"type": "rows", "arrays": [["float32", shape]]}))


@pytest.mark.parametrize(
    ("header", "tokens", "problem"),
    [
        ({"type": "steps", "steps": [["a", 0, 2, 1, 0, True, ""], ["a", 0, 1, 1, 0, True, ""]]}, 3, "named twice"),
        ({"type": "steps", "steps": [["a", 0, 2, 1, 0, True, ""]]}, 3, "promises steps of 2 tokens, not 3"),
        ({"type": "steps", "steps": [["a", -1, 3, 1, 0, True, ""]]}, 3, "must not be negative"),
        ({"type": "steps", "steps": [["a", 0, 3, 9, 0, True, ""]]}, 3, "a step of 3 tokens cannot return 9 states"),
        ({"type": "steps", "steps": [["", 0, 3, 1, 0, True, ""]]}, 3, "needs a name"),
        ({"type": "steps", "steps": [["a", 0, -3, 1, 0, True, ""], ["b", 0, 6, 1, 0, True, ""]]}, 3, "promises"),
        ({"type": "steps", "steps": [["a", 0, 3, 1, 0, True, ""]], "more": 1}, 3, "header"),
        ({"type": "steps", "steps": [["a", "0", 3, 1, 0, True, ""]]}, 3, "header"),
    ],
)
def test_steps_that_make_no_sense_are_refused(header, tokens, problem):
    frame = frame_of({"arrays": [["int32", [tokens]]], "fingerprint": "f", **header}, tokens)
    with pytest.raises(BadFrame, match=problem):
        codec.decode_steps(frame)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"prefix": 1, "lengths": [2], "first": [0]}, None),
        ({"prefix": 3, "lengths": [], "first": []}, "at least one sequence"),
        ({"prefix": -1, "lengths": [4], "first": [0]}, "promises"),
        ({"prefix": 1, "lengths": [3], "first": [0]}, "promises sequences of 4 tokens, not 3"),
        ({"prefix": 0, "lengths": [4, -1], "first": [0, 0]}, "promises"),
        ({"prefix": 0, "lengths": [3], "first": [3]}, "first position 3 lies outside"),
        ({"prefix": 0, "lengths": [3], "first": []}, "1 sequences, but 0 first positions"),
        ({"lengths": [3], "first": [0]}, "header"),
        ({"prefix": 0, "lengths": [3], "first": [0], "fingerprint": 5}, "header"),
    ],
)
def test_batches_that_make_no_sense_are_refused(header, problem):
    defaults = {"type": "extract", "arrays": [["int32", [3]]], "fingerprint": "f", "handle": "", "for_gradient": False}
    frame = frame_of({**defaults, **header}, 3)
    if problem is None:
        assert codec.decode_extract(frame) == (ExtractBatch([[1, 2]], [0], (0,)), "f")
    else:
        with pytest.raises(BadFrame, match=problem):
            codec.decode_extract(frame)


def test_frames_of_an_older_version_are_refused_by_name():
    frame = bytearray(GOOD["steps"])
    frame[4] = 1
    with pytest.raises(BadFrame, match=f"has version 1, this side speaks {VERSION}"):
        codec.decode_steps(bytes(frame))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prefixes_and_gradients_arrive_bit_for_bit(dtype):
    prefix = Prefix(torch.randn(3, SHAPE.width).to(dtype), SHAPE, 2, (5, 6, 7))
    received, fingerprint = codec.decode_prefix(codec.encode_prefix(prefix, "plm"))
    assert (received.shape, received.frozen, received.text, fingerprint) == (SHAPE, 2, (5, 6, 7), "plm")
    assert received.handle == prefix.handle  # content and number format
    batch, gradient = ExtractBatch([[5, 6], [7]], [1, 0], (8,), prefix.handle), torch.randn(2, 7).to(dtype)
    same, rows, fingerprint = codec.decode_gradient(codec.encode_gradient(batch, gradient, "plm"))
    assert (same, fingerprint) == (batch, "plm") and torch.equal(rows, gradient)


def test_texts_arrive_as_they_were_sent():
    assert codec.decode_text(codec.encode_text([5, 2**31 - 1], "plm")) == ([5, 2**31 - 1], "plm")
    with pytest.raises(BadFrame, match="at least one token"):
        codec.decode_text(codec.encode_text([], "plm"))


def test_prefixes_and_gradients_that_make_no_sense_are_refused_by_name():
    with pytest.raises(UserError, match=r"crosses the line in float32, .* not in torch.float64"):
        codec.encode_prefix(Prefix(torch.zeros(3, SHAPE.width, dtype=torch.float64), SHAPE), "plm")
    with pytest.raises(BadFrame, match="2 representations comes with gradients of 3"):
        codec.decode_gradient(codec.encode_gradient(ExtractBatch([[5, 6]], [0]), torch.zeros(3, 4), "plm"))
    frame = codec.encode_prefix(Prefix(torch.zeros(3, SHAPE.width), SHAPE), "plm")
    for change, problem in (
        ({"layers": 3}, "rows of 24 numbers, not"),
        ({"heads": 0}, "sizes above 0"),
        ({"head_size": -2}, "sizes above 0"),
        ({"frozen": 4}, "4 frozen positions of 3"),
    ):
        length = struct.unpack_from("<I", frame, 5)[0]
        header = {**msgspec.msgpack.decode(frame[9 : 9 + length]), **change}
        with pytest.raises(BadFrame, match=problem):
            codec.decode_prefix(framed_bytes(msgspec.msgpack.encode(header)) + frame[9 + length :])
