"""The bytes of the line: a small typed header and raw little-endian arrays. Never pickle, never numbers as text.

A frame is `PEMA`, a version byte, the header's length (4 bytes) and MessagePack header, then the arrays' bytes, one
after the other. The header describes every array; all sizes are checked against the bytes received before any memory
is allocated. N rows, H hidden.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import torch

from pema_ray.errors import UserError
from pema_ray.line.messages import ExtractBatch
from pema_ray.line.prefix import Prefix, PrefixShape
from pema_ray.line.protocol import Busy, PrefixLost, SessionLost, Step, Stepped

MEDIA_TYPE = "application/x-pema-line"
_MAGIC, _VERSION = b"PEMA", 4
_HEAD = struct.Struct("<4sBI")
_LARGEST_HEADER = 8 * 2**20
_LIST_LIMIT = msgspec.Meta(max_length=2**17)
_LARGEST_SIDE = 2**31
_Handle = Annotated[str, msgspec.Meta(max_length=64)]  # a sha256, in hexadecimal digits
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUMPY = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2", "int32": "<i4", "uint8": "u1"}


class BadFrame(ValueError):
    """Bytes that are no frame of this kind; the message says why."""


class _Array(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    arrays: Annotated[list[_Array], msgspec.Meta(max_length=4096)]


class _BatchHeader(_Header):
    fingerprint: str
    prefix: int
    lengths: Annotated[list[int], _LIST_LIMIT]
    first: Annotated[list[int], _LIST_LIMIT]
    handle: _Handle


class _ExtractHeader(_BatchHeader, tag="extract"):
    for_gradient: bool


class _GradientHeader(_BatchHeader, tag="gradient"):
    pass


class _TextHeader(_Header, tag="text"):
    fingerprint: str


class _PrefixHeader(_Header, tag="prefix"):
    fingerprint: str
    layers: int
    heads: int
    head_size: int
    frozen: int


class _RowsHeader(_Header, tag="rows"):
    pass


class _StepHeader(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    session: str
    position: int
    tokens: int
    states: int
    draft: int
    waits: bool
    handle: _Handle


class _StepsHeader(_Header, tag="steps"):
    fingerprint: str
    steps: Annotated[list[_StepHeader], _LIST_LIMIT]


class _Outcome(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    states: int
    drafted: tuple[int, ...] = ()
    error: str = ""
    message: str = ""
    retry_after: float = 0.0


class _SteppedHeader(_Header, tag="stepped"):
    outcomes: Annotated[list[_Outcome], _LIST_LIMIT]


class _FilesHeader(_Header, tag="files"):
    names: list[str]


_AnyHeader = (
    _ExtractHeader | _GradientHeader | _TextHeader | _PrefixHeader | _RowsHeader | _StepsHeader | _SteppedHeader
    | _FilesHeader
)  # fmt: skip
_H = TypeVar("_H", bound=_AnyHeader)


# ── frames ──────────────────────────────────────────────────────────────────────


def _frame(header: _AnyHeader, arrays: Sequence[np.ndarray]) -> bytes:
    packed = msgspec.msgpack.encode(header)
    return b"".join([_HEAD.pack(_MAGIC, _VERSION, len(packed)), packed, *(a.tobytes() for a in arrays)])


def _parse(data: bytes, kind: type[_H]) -> tuple[_H, list[np.ndarray]]:
    if len(data) < _HEAD.size:
        raise BadFrame(f"{len(data)} bytes are no frame.")
    magic, version, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise BadFrame("The bytes do not begin as a frame of the line does.")
    if version != _VERSION:
        raise BadFrame(f"The frame has version {version}, this side speaks {_VERSION}.")
    if length > min(_LARGEST_HEADER, len(data) - _HEAD.size):
        raise BadFrame(f"The frame promises a header of {length} bytes, more than there are.")
    begin = _HEAD.size + length
    try:
        header = msgspec.msgpack.decode(data[_HEAD.size : begin], type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadFrame(f"The frame's header: {error}") from None
    arrays = []
    for number, array in enumerate(header.arrays):
        if array.dtype not in _NUMPY:
            raise BadFrame(f"Array {number} is of {array.dtype!r}; known are {', '.join(_NUMPY)}.")
        dtype = np.dtype(_NUMPY[array.dtype])
        if len(array.shape) > 2 or any(not 0 <= size < _LARGEST_SIDE for size in array.shape):
            raise BadFrame(f"Array {number} has shape {array.shape}.")
        size = prod(array.shape) * dtype.itemsize
        if size > len(data) - begin:
            raise BadFrame(f"Array {number} should have {size} bytes, {len(data) - begin} are left.")
        arrays.append(np.frombuffer(data, dtype, prod(array.shape), begin).reshape(array.shape))
        begin += size
    if begin != len(data):
        raise BadFrame(f"{len(data) - begin} bytes follow the last array.")
    return header, arrays


def _single_array(arrays: Sequence[np.ndarray], dimensions: int, *dtypes: str) -> np.ndarray:
    if len(arrays) != 1 or arrays[0].ndim != dimensions or arrays[0].dtype not in [np.dtype(_NUMPY[d]) for d in dtypes]:
        actual = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays) or "none"
        raise BadFrame(f"One array of {' or '.join(dtypes)} with {dimensions} dimensions is expected, not {actual}.")
    return arrays[0]


def _token_array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, "<i4").reshape(-1)


def _ids(array: np.ndarray) -> list[int]:
    if len(array) and array.min() < 0:
        raise BadFrame(f"Token ids are not negative; there is {array.min()}.")
    return array.tolist()


# ── requests ────────────────────────────────────────────────────────────────────


def encode_extract(batch: ExtractBatch, fingerprint: str) -> bytes:
    """A request for the representations of a batch.

    Args:
        fingerprint: of the PLM that must compute them.
    """
    ids = _batch_ids(batch)
    fields = (*_batch_fields(batch), batch.for_gradient)
    return _frame(_ExtractHeader([_Array("int32", ids.shape)], fingerprint, *fields), [ids])


def decode_extract(data: bytes) -> tuple[ExtractBatch, str]:
    """Read a frame of `encode_extract`: the batch and the fingerprint.

    Raises:
        BadFrame: the bytes are no such frame.
    """
    header, arrays = _parse(data, _ExtractHeader)
    batch = _batch_of(header, _single_array(arrays, 1, "int32"))
    return replace(batch, for_gradient=header.for_gradient), header.fingerprint


def encode_gradient(batch: ExtractBatch, d_state_NH: torch.Tensor, fingerprint: str) -> bytes:
    """A request for the gradient of a batch's key-value prefix.

    Args:
        d_state_NH: the gradient of a loss with respect to the batch's representations, `[N, H]`.
        fingerprint: of the PLM that must compute it.
    """
    ids, (array, raw) = _batch_ids(batch), _state_array(d_state_NH)
    arrays = [_Array("int32", ids.shape), array]
    return _frame(_GradientHeader(arrays, fingerprint, *_batch_fields(batch)), [ids, raw])


def decode_gradient(data: bytes) -> tuple[ExtractBatch, torch.Tensor, str]:
    """Read a frame of `encode_gradient`: the batch, the gradient of its representations, and the fingerprint.

    Raises:
        BadFrame: the bytes are no such frame, or do not hold one row for each representation.
    """
    header, arrays = _parse(data, _GradientHeader)
    batch = _batch_of(header, _single_array(arrays[:1], 1, "int32"))
    d_state_NH = _states(header.arrays[1:], arrays[1:])
    if len(d_state_NH) != batch.rows:
        raise BadFrame(f"A batch of {batch.rows} representations comes with gradients of {len(d_state_NH)}.")
    return batch, d_state_NH, header.fingerprint


def encode_text(token_ids: Sequence[int], fingerprint: str) -> bytes:
    """A request for the keys and values of a text.

    Args:
        fingerprint: of the PLM that must compute them.
    """
    ids = _token_array(token_ids)
    return _frame(_TextHeader([_Array("int32", ids.shape)], fingerprint), [ids])


def decode_text(data: bytes) -> tuple[list[int], str]:
    """Read a frame of `encode_text`: the token ids and the fingerprint.

    Raises:
        BadFrame: the bytes are no such frame, or hold no token.
    """
    header, arrays = _parse(data, _TextHeader)
    ids = _ids(_single_array(arrays, 1, "int32"))
    if not ids:
        raise BadFrame("A text has at least one token.")
    return ids, header.fingerprint


def encode_prefix(prefix: Prefix, fingerprint: str) -> bytes:
    """A key-value prefix in its own number format.

    Args:
        fingerprint: of the PLM that it is for.

    Raises:
        UserError: its numbers are of a format that does not cross the line, such as float64.
    """
    if prefix.embeddings.dtype not in _TORCH.values():
        raise UserError(f"A prefix crosses the line in {', '.join(_TORCH)}, not in {prefix.embeddings.dtype}.")
    (array, raw), ids, shape = _state_array(prefix.embeddings), _token_array(prefix.text), prefix.shape
    arrays = [array, _Array("int32", ids.shape)]
    header = _PrefixHeader(arrays, fingerprint, shape.layers, shape.heads, shape.head_size, prefix.frozen)
    return _frame(header, [raw, ids])


def decode_prefix(data: bytes) -> tuple[Prefix, str]:
    """Read a frame of `encode_prefix`: the prefix and the fingerprint.

    Raises:
        BadFrame: the bytes are no such frame, or not of the shape that it promises.
    """
    header, arrays = _parse(data, _PrefixHeader)
    shape = PrefixShape(header.layers, header.heads, header.head_size)
    if min(header.layers, header.heads, header.head_size) < 1:
        raise BadFrame(f"A prefix has sizes above 0, not {shape}.")
    try:
        text = tuple(_ids(_single_array(arrays[1:], 1, "int32")))
        return Prefix(_states(header.arrays[:1], arrays[:1]), shape, header.frozen, text), header.fingerprint
    except ValueError as error:
        raise BadFrame(str(error)) from None


def _batch_ids(batch: ExtractBatch) -> np.ndarray:
    return _token_array([*batch.prefix, *(token for sequence in batch.token_ids for token in sequence)])


def _batch_fields(batch: ExtractBatch) -> tuple[int, list[int], list[int], str]:
    return len(batch.prefix), [len(sequence) for sequence in batch.token_ids], list(batch.first), batch.handle


def _batch_of(header: _BatchHeader, flat: np.ndarray) -> ExtractBatch:
    tokens = header.prefix + sum(header.lengths)
    if header.prefix < 0 or any(length < 1 for length in header.lengths) or tokens != len(flat):
        raise BadFrame(f"The header promises sequences of {tokens} tokens, not {len(flat)}.")
    ids, ends = _ids(flat), (header.prefix + np.cumsum(header.lengths)).tolist()
    sequences = [ids[e - n : e] for e, n in zip(ends, header.lengths, strict=True)]
    try:
        return ExtractBatch(sequences, header.first, tuple(ids[: header.prefix]), header.handle)
    except ValueError as error:
        raise BadFrame(str(error)) from None


def encode_steps(steps: Sequence[Step], fingerprint: str) -> bytes:
    """Steps of any number of sessions.

    Args:
        fingerprint: of the PLM that must take them.
    """
    ids = _token_array([token for step in steps for token in step.tokens])
    headers = [_StepHeader(s.session, s.position, len(s.tokens), s.states, s.draft, s.waits, s.handle) for s in steps]
    return _frame(_StepsHeader([_Array("int32", ids.shape)], fingerprint, headers), [ids])


def decode_steps(data: bytes) -> tuple[list[Step], str]:
    """Read a frame of `encode_steps`: the steps and the fingerprint.

    Raises:
        BadFrame: the bytes are no such frame, or a step makes no sense.
    """
    header, arrays = _parse(data, _StepsHeader)
    flat = _ids(_single_array(arrays, 1, "int32"))
    tokens = sum(step.tokens for step in header.steps)
    if any(step.tokens < 1 for step in header.steps) or tokens != len(flat):
        raise BadFrame(f"The header promises steps of {tokens} tokens, not {len(flat)}.")
    steps, begin = [], 0
    for s in header.steps:
        try:
            tokens = flat[begin : begin + s.tokens]
            steps.append(Step(s.session, s.position, tokens, s.states, s.draft, s.waits, s.handle))
        except ValueError as error:
            raise BadFrame(str(error)) from None
        begin += s.tokens
    if len({step.session for step in steps}) < len(steps):
        raise BadFrame("A message holds at most one step of each session; a session is named twice.")
    return steps, header.fingerprint


# ── answers ─────────────────────────────────────────────────────────────────────


def encode_rows(state_NH: torch.Tensor) -> bytes:
    """Representations `[N, H]` in float32, bfloat16 or float16."""
    array, raw = _state_array(state_NH)
    return _frame(_RowsHeader([array]), [raw])


def decode_rows(data: bytes) -> torch.Tensor:
    """Read what `encode_rows` wrote.

    Raises:
        BadFrame: the bytes are no such frame.
    """
    header, arrays = _parse(data, _RowsHeader)
    return _states(header.arrays, arrays)


def encode_stepped(outcomes: Sequence[Stepped | Exception]) -> bytes:
    """The outcomes of steps, in their order; an error by its kind and message."""
    headers = []
    for o in outcomes:
        if isinstance(o, Stepped):
            headers.append(_Outcome(len(o.state_NH), o.drafted))
        elif isinstance(o, SessionLost):
            headers.append(_Outcome(0, error="lost"))
        elif isinstance(o, PrefixLost):
            headers.append(_Outcome(0, error="prefix_lost", message=str(o)))
        elif isinstance(o, Busy):
            headers.append(_Outcome(0, error="busy", message=str(o), retry_after=o.retry_after))
        else:
            headers.append(_Outcome(0, error="refused", message=str(o)))
    states = [o.state_NH for o in outcomes if isinstance(o, Stepped)]
    if not states:
        return _frame(_SteppedHeader([], headers), [])
    array, raw = _state_array(torch.cat(states))
    return _frame(_SteppedHeader([array], headers), [raw])


def decode_stepped(data: bytes, refused: type[Exception]) -> list[Stepped | Exception]:
    """Read what `encode_stepped` wrote.

    Args:
        refused: the type of an error that is not `SessionLost`, `PrefixLost` or `Busy`; it gets the message.

    Raises:
        BadFrame: the bytes are no such frame.
    """
    header, arrays = _parse(data, _SteppedHeader)
    if any(outcome.states < 0 for outcome in header.outcomes):
        raise BadFrame("An outcome has a negative number of states.")
    rows = sum(outcome.states for outcome in header.outcomes)
    states = _states(header.arrays, arrays) if rows or arrays else torch.empty(0, 0)
    if len(states) != rows:
        raise BadFrame(f"The header promises {rows} states, not {len(states)}.")
    outcomes: list[Stepped | Exception] = []
    begin = 0
    for o in header.outcomes:
        if o.error:
            outcomes.append(
                SessionLost() if o.error == "lost"
                else PrefixLost(o.message) if o.error == "prefix_lost"
                else Busy(o.message, o.retry_after) if o.error == "busy"
                else refused(o.message)
            )  # fmt: skip
            continue
        if not o.states:
            raise BadFrame("An outcome has neither states nor an error.")
        outcomes.append(Stepped(states[begin : begin + o.states], o.drafted))
        begin += o.states
    return outcomes


def encode_files(files: Mapping[str, bytes]) -> bytes:
    """Small files by name, such as an LM-head bundle's."""
    raw = [np.frombuffer(content, np.uint8) for content in files.values()]
    return _frame(_FilesHeader([_Array("uint8", array.shape) for array in raw], list(files)), raw)


def decode_files(data: bytes) -> dict[str, bytes]:
    """Read what `encode_files` wrote.

    Raises:
        BadFrame: the bytes are no such frame, or a name leads out of the folder.
    """
    header, arrays = _parse(data, _FilesHeader)
    if len(header.names) != len(arrays) or len(set(header.names)) < len(header.names):
        raise BadFrame(f"{len(arrays)} files have {len(set(header.names))} names.")
    for name in header.names:
        if not name or name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise BadFrame(f"{name!r} is no name of a file here.")
    if any(array.ndim != 1 or array.dtype != np.uint8 for array in arrays):
        raise BadFrame("Files are arrays of bytes.")
    return {name: array.tobytes() for name, array in zip(header.names, arrays, strict=True)}


def _state_array(state_NH: torch.Tensor) -> tuple[_Array, np.ndarray]:
    state = state_NH.detach().to("cpu").contiguous()
    name = next((name for name, dtype in _TORCH.items() if dtype == state.dtype), None)
    if name is None or state.ndim != 2:
        raise ValueError(f"representations are rows of {', '.join(_TORCH)}, not {state.dtype}{list(state.shape)}")
    raw = state.view(torch.uint16).numpy() if name == "bfloat16" else state.numpy()
    return _Array(name, tuple(state.shape)), raw


def _states(headers: Sequence[_Array], arrays: Sequence[np.ndarray]) -> torch.Tensor:
    raw = _single_array(arrays, 2, *_TORCH)
    name = headers[0].dtype
    tensor = torch.from_numpy(np.array(raw))  # a copy: the received bytes are read-only
    return tensor.view(_TORCH[name]) if name == "bfloat16" else tensor


def as_error(data: Any) -> str:
    """The message of an error answer `{"error": {"message": …}}`, else the beginning of its text."""
    try:
        return str(msgspec.json.decode(data)["error"]["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return " ".join(bytes(data)[:200].decode("utf-8", "replace").split())
