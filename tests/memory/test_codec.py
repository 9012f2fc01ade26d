"""Every number format keeps representations within its own precision, and refuses what it cannot hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pema_ray.errors import UserError
from pema_ray.memory.codec import KEY_DTYPES, KeyDtype, Keys, encode

SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 9))
ANY = arrays.arrays("float32", SHAPES, elements=st.floats(-65_000, 65_000, width=32))


@given(exact=ANY, dtype=st.sampled_from(KEY_DTYPES))
def test_a_number_comes_back_within_the_formats_precision(exact: np.ndarray, dtype: KeyDtype):
    keys = encode(exact, dtype)
    back = keys[:]
    assert back.dtype == np.float32 and back.shape == keys.shape == exact.shape
    error = np.abs(back.astype(np.float64) - exact)
    largest = np.abs(exact).max(axis=1, initial=0.0, keepdims=True)
    allowed = {
        "float32": 0.0 * error,
        "float16": np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25),
        "bfloat16": np.abs(exact) * 2.0**-8 + 1e-38,
        "int8": np.broadcast_to(largest / 127 * 0.5001 + 1e-42, error.shape),
    }[dtype]
    assert (error <= allowed).all()


@given(exact=ANY)
def test_bfloat16_rounds_as_torch_does(exact: np.ndarray):
    theirs = torch.from_numpy(exact).bfloat16().float().numpy()
    assert np.array_equal(encode(exact, "bfloat16")[:], theirs)


@given(exact=ANY, dtype=st.sampled_from(KEY_DTYPES), data=st.data())
def test_rows_are_taken_and_joined_as_they_are_stored(exact: np.ndarray, dtype: KeyDtype, data):
    keys = encode(exact, dtype)
    cut = data.draw(st.integers(0, len(keys)))
    joined = Keys.concatenate([keys.take(slice(0, cut)), keys.take(slice(cut, None))])
    assert joined.data.tobytes() == keys.data.tobytes() and np.array_equal(joined[:], keys[:])
    rows = np.array(data.draw(st.lists(st.integers(0, len(keys) - 1), max_size=5)) if len(keys) else [], np.int64)
    assert np.array_equal(keys.take(rows)[:], keys[rows]) and np.array_equal(keys[rows], keys[:][rows])


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_rows_are_read_whatever_the_array_that_holds_them(dtype: KeyDtype):
    keys = encode(np.random.default_rng(0).standard_normal((6, 4), np.float32), dtype)
    exact = keys[:]
    assert np.array_equal(keys[::-1], exact[::-1])
    assert np.array_equal(keys[np.array([5, -6], np.int32)], exact[[5, 0]])
    assert np.array_equal(keys[np.array([1, 2], np.uint64)], exact[[1, 2]])
    assert np.array_equal(keys[exact[:, 0] > 0], exact[exact[:, 0] > 0])
    keys.data.flags.writeable = False
    columns_first = Keys(dtype, np.asfortranarray(keys.data), keys.scale)
    for layout in (keys, columns_first):
        assert np.array_equal(layout[1:3], exact[1:3]) and np.array_equal(layout[np.array([4, 1])], exact[[4, 1]])
    with pytest.raises(IndexError):
        keys[np.array([6])]


def test_int8_takes_a_quarter_and_keeps_signs_and_zero_rows():
    exact = np.stack([np.linspace(-3, 3, 576), np.zeros(576), np.full(576, 1e-44)]).astype(np.float32)
    keys = encode(exact, "int8")
    assert keys.nbytes <= 0.27 * exact.nbytes
    assert keys.data[0].min() == -127 and keys.data[0].max() == 127
    assert (keys[:][1] == 0).all() and np.isfinite(keys[:]).all()
    assert np.array_equal(np.sign(keys[:][0]), np.sign(np.rint(exact[0] / exact[0].max() * 127)))


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_what_is_no_number_is_refused(wrong: float, dtype: KeyDtype):
    with pytest.raises(UserError, match="not finite.*plm.dtype=float32"):
        encode(np.array([[1.0, wrong]], np.float32), dtype)


def test_what_float16_cannot_hold_is_refused_with_a_way_out():
    with pytest.raises(UserError, match="reaches 7e\\+04, float16 ends at 65504.*bfloat16"):
        encode(np.array([[70_000.0]], np.float32), "float16")
    assert encode(np.array([[70_000.0]], np.float32), "bfloat16")[:] == pytest.approx(70_000, rel=2**-8)


def test_data_that_do_not_fit_their_format_are_refused():
    with pytest.raises(ValueError, match="matrix"):
        Keys("float16", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="scale"):
        Keys("int8", np.zeros((2, 3), np.int8))
    with pytest.raises(ValueError, match="scale"):
        Keys("float32", np.zeros((2, 3), np.float32), np.ones(2, np.float32))


def test_a_number_that_bfloat16_rounds_to_infinity_is_refused():
    largest = np.float32(3.3895314e38)  # bfloat16's own
    assert encode(np.array([[largest, -largest]]), "bfloat16")[:].tolist() == [[float(largest), -float(largest)]]
    with pytest.raises(UserError, match="more than bfloat16 holds. Set build_memory.key_dtype=float32"):
        encode(np.array([[np.finfo(np.float32).max, 0.0]]), "bfloat16")
