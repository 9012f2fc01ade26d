"""Text that is streamed is the text that would have been given whole, and never shows part of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.serving.text import TextStream


def as_bytes(tokens) -> str:
    """Tokens are bytes: characters come in pieces, as in byte-level vocabularies."""
    return bytes(tokens).decode("utf-8", "replace")


STOPS = st.lists(st.text("abé日", min_size=1, max_size=4), max_size=3)


@given(text=st.text(alphabet="abé日🙂 \n", max_size=30), stops=STOPS)
def test_pieces_make_the_whole_up_to_the_first_stop(text, stops):
    stream, told = TextStream(as_bytes, stops), ""
    for token in text.encode():
        told += stream.push(token)
        assert not any(stop in told for stop in stops)
        assert "\ufffd" not in told
        if stream.stopped:
            break
    told += stream.finish()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        assert stream.stopped
        assert told == stream.text
        assert told in [text[:at] for at in ends]  # that of the stop string that was complete first
    else:
        assert told == text


def test_text_is_told_as_soon_as_it_cannot_change():
    stream = TextStream(as_bytes, ["END"])
    assert [stream.push(t) for t in b"abE"] == ["a", "b", ""]
    assert stream.push(ord("x")) == "Ex"
    assert [stream.push(t) for t in b"\xc3\xa9"] == ["", "é"]
    assert [stream.push(t) for t in b"EN"] == ["", ""]
    assert stream.finish() == "EN"


def test_bytes_that_are_no_character_are_told_at_the_end():
    stream = TextStream(as_bytes)
    assert [stream.push(t) for t in b"a\xff"] == ["a", ""]
    assert stream.finish() == "\ufffd"


def test_several_bytes_that_are_no_character_yet_are_held_back():
    """Tokenizers with byte fallback say one replacement character for each byte."""

    def one_each(tokens) -> str:
        data = bytes(tokens)
        return data.decode("utf-8", "ignore") if data.isascii() or len(data) >= 4 else "\ufffd" * len(data)

    stream = TextStream(one_each)
    assert [stream.push(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]
