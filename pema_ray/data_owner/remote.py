"""A PLM owner of another organisation, over HTTPS: a `PLMClient` whose frames carry a key and a fingerprint.

A user must fix a `UserError` (key, certificate, a sequence that is too long); `Busy` is temporary (quota, no slot, a
service that restarts); `ConnectionError` is a dead line. N rows, H hidden.
"""

from __future__ import annotations

import asyncio
import ssl
from asyncio import sleep
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, Description, ExtractBatch, Limits, LMHeadBundle, ModelCard, Step, Stepped, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.prefix import Prefix, PrefixShape
from pema_ray.line.protocol import BACKWARD_TOKENS, PrefixLost

T = TypeVar("T")
_BUSY = (429, 502, 503, 504)
_PREFIX_LOST = 410
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER", "HTTP_REQUEST")  # in OpenSSL's messages
_TOKEN_BYTES = 4
_SEQUENCE_BYTES = 10  # of a frame's header: a length and a first position
_HEADER_BYTES = 4096
_EXACT_BYTES = 4  # of a number in the widest format that crosses the line
_LONGEST_WAIT = 600.0  # seconds, between the requests of one batch
_UNLIMITED = 2**31 - 1
_Count = Annotated[int, msgspec.Meta(ge=1, lt=2**40)]


class _RequestLimits(msgspec.Struct):
    max_steps: _Count
    max_rows: _Count
    max_draft: Annotated[int, msgspec.Meta(ge=0)]
    max_body_mb: Annotated[float, msgspec.Meta(gt=0.01)]


class _Quota(msgspec.Struct, frozen=True):
    rows_per_minute: Annotated[int, msgspec.Meta(ge=0)] = _UNLIMITED
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=0)] = _UNLIMITED
    sessions: Annotated[int, msgspec.Meta(ge=0)] = _UNLIMITED


class _PrefixShape(msgspec.Struct, frozen=True):
    layers: _Count
    heads: _Count
    head_size: _Count


class _Model(msgspec.Struct):
    """The answer of `/v1/model`."""

    name: str
    fingerprint: str
    hidden_size: _Count
    vocab_size: _Count
    max_positions: _Count
    eos_token_ids: tuple[int, ...]
    max_session_tokens: _Count
    max_sessions: _Count
    limits: _RequestLimits
    quota: _Quota = _Quota()
    prefix_shape: _PrefixShape | None = None
    keeps_start: bool = False


class RemotePLM:
    """A client of another organisation's PLM owner.

    Args:
        config: `url`, `key_file`, `ca_file` and `timeout_seconds` of `plm`.
        fingerprint: of the PLM that must answer; by default that of the first `describe`.
        transport: httpx's own by default.

    Raises:
        UserError: the key or the certificates cannot be read.
    """

    def __init__(
        self,
        config: PLMConfig,
        fingerprint: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.config, self._fingerprint = config, fingerprint or config.fingerprint
        key = _key(config.key_file)
        self._http = httpx.AsyncClient(
            base_url=config.url or "",
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            verify=_trusted(config.ca_file),
            timeout=httpx.Timeout(config.timeout_seconds, connect=min(10.0, config.timeout_seconds)),
            transport=transport,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
        )
        self._described: Description | None = None
        self._body_bytes, self._max_tokens = 0, _UNLIMITED  # of one request

    async def describe(self) -> Description:
        if self._described is None:
            answer = await self._request("GET", "/v1/model", headers=self._pinned())
            try:
                model = msgspec.json.decode(answer.content, type=_Model)
            except msgspec.MsgspecError as error:
                raise UserError(f"{self.config.url}: is no PLM owner's service: {error}") from None
            card = ModelCard(
                model.name,
                model.fingerprint,
                model.hidden_size,
                model.vocab_size,
                model.max_positions,
                model.eos_token_ids,
            )
            if self._fingerprint not in (None, card.fingerprint):
                raise FingerprintMismatch(self.config.label, card.label, str(self._fingerprint))
            limits, quota = model.limits, model.quota
            self._fingerprint, self._body_bytes = card.fingerprint, int(limits.max_body_mb * 2**20)
            self._max_tokens = quota.tokens_per_minute
            self._described = Description(
                card,
                Limits(
                    max_tokens=model.max_session_tokens,
                    max_draft=limits.max_draft,
                    max_steps=limits.max_steps,
                    max_rows=max(1, min(limits.max_rows, quota.rows_per_minute)),
                    max_sessions=max(1, min(model.max_sessions, quota.sessions)),
                ),
                None if model.prefix_shape is None else PrefixShape(**msgspec.structs.asdict(model.prefix_shape)),
                model.keeps_start,
            )
        return self._described

    def _pinned(self) -> dict[str, str]:
        return {} if self._fingerprint is None else {"X-PLM-Fingerprint": self._fingerprint}

    async def lm_head(self) -> LMHeadBundle:
        card = (await self.describe()).card
        frame = (await self._request("GET", "/v1/lm-head", headers=self._pinned())).content
        bundle = LMHeadBundle.from_files(self._read("/v1/lm-head", frame, codec.decode_files))
        if bundle.card.fingerprint != card.fingerprint:
            raise FingerprintMismatch(f"The LM head of {self.config.url}", bundle.card.label, card.label)
        return bundle

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        """Representations `[N, H]`; a batch beyond the PLM owner's limits is split into requests, sent in turn.

        After the first of them this waits for the quota itself, as repeating all of them would use it up again.
        """
        limits = (await self.describe()).limits
        if batch.for_gradient:
            requests = await self._gradient_requests(batch)
        else:
            requests = _requests(batch, limits.max_rows, self._max_tokens, self._body_bytes)
        rows = [row_NH async for row_NH in _in_turn(partial(self._extract, request) for request in requests)]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    async def read_prefix(self, token_ids: Sequence[int]) -> Prefix:
        shape = await self._prefix_shape()
        body = codec.encode_text(token_ids, (await self.describe()).card.fingerprint)
        prefix, _ = await self._frame("/v1/prefixes/read", body, codec.decode_prefix)
        if len(prefix) != len(token_ids) or prefix.shape != shape:
            raise UserError(f"{self.config.url}: sent a prefix of {len(prefix)} positions for {len(token_ids)} tokens.")
        return prefix

    async def put_prefix(self, prefix: Prefix) -> None:
        await self._prefix_shape()
        body = codec.encode_prefix(prefix, (await self.describe()).card.fingerprint)
        if len(body) > self._body_bytes:
            raise UserError(
                f"{self.config.url}: takes bodies of {self._body_bytes / 2**20:.2f} MiB (limits.max_body_mb), this "
                f"prefix has {len(body) / 2**20:.2f}: train a shorter one, or ask for a higher limit."
            )
        await self._request("POST", "/v1/prefixes", content=body, headers={"Content-Type": codec.MEDIA_TYPE})

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        """As `AdaptablePLM.gradient`; the gradients of the requests that `extract` has sent are added up."""
        shape, requests = await self._prefix_shape(), await self._gradient_requests(batch)
        parts = d_state_NH.split([request.rows for request in requests])
        calls = (partial(self._gradient, request, part) for request, part in zip(requests, parts, strict=True))
        total: torch.Tensor | None = None
        async for d_prefix_nW in _in_turn(calls):
            expected = (len(d_prefix_nW) if total is None else len(total), shape.width)
            if d_prefix_nW.shape != expected or not torch.isfinite(d_prefix_nW).all():
                raise UserError(f"{self.config.url}: sent no gradient of a prefix: {list(d_prefix_nW.shape)}.")
            total = d_prefix_nW if total is None else total.float() + d_prefix_nW
        assert total is not None
        return total.to(d_state_NH.dtype)

    async def _gradient_requests(self, batch: ExtractBatch) -> list[ExtractBatch]:
        """The batch in requests of which gradients may be asked."""
        description = await self.describe()
        row_bytes = _EXACT_BYTES * description.card.hidden_size
        max_rows = max(1, min(description.limits.max_rows, self._body_bytes // (2 * row_bytes)))
        max_tokens = self._max_tokens // BACKWARD_TOKENS
        return list(_requests(batch, max_rows, max_tokens, self._body_bytes, row_bytes))

    async def _gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        body = codec.encode_gradient(batch, d_state_NH, (await self.describe()).card.fingerprint)
        return await self._frame("/v1/gradient", body, codec.decode_rows)

    async def _prefix_shape(self) -> PrefixShape:
        shape = (await self.describe()).prefix_shape
        if shape is None:
            raise UserError(f"{self.config.label}: takes no prefixes: its owner has not set adaptation: prefix.")
        return shape

    async def _extract(self, batch: ExtractBatch) -> torch.Tensor:
        card = (await self.describe()).card
        rows = await self._frame("/v1/extract", codec.encode_extract(batch, card.fingerprint), codec.decode_rows)
        if rows.shape != (batch.rows, card.hidden_size):
            raise UserError(f"{self.config.url}: sent {list(rows.shape)} for a batch of {batch.rows} rows.")
        return rows

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        limits = (await self.describe()).limits
        messages = list(_messages(steps, limits.max_steps, limits.max_rows, self._max_tokens))
        answers = await asyncio.gather(*(self._step(message) for message in messages), return_exceptions=True)
        outcomes: list[Stepped | Exception] = []
        for message, answer in zip(messages, answers, strict=True):
            if isinstance(answer, Exception) and len(messages) > 1 and not isinstance(answer, FingerprintMismatch):
                outcomes += [answer] * len(message)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                outcomes += answer
        return outcomes

    async def _step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        card = (await self.describe()).card
        body = codec.encode_steps(steps, card.fingerprint)
        outcomes = await self._frame("/v1/sessions/step", body, partial(codec.decode_stepped, refused=UserError))
        if len(outcomes) != len(steps):
            raise UserError(f"{self.config.url}: answered {len(outcomes)} of {len(steps)} steps.")
        for step, outcome in zip(steps, outcomes, strict=True):
            if isinstance(outcome, Stepped) and not _matches(outcome, step, card):
                raise UserError(f"{self.config.url}: sent {list(outcome.state_NH.shape)} for a step of {step.session}.")
        return outcomes

    async def close(self, sessions: Sequence[str]) -> None:
        if sessions:
            await self._request("POST", "/v1/sessions/close", json=list(sessions))

    async def end(self) -> None:
        await self._http.aclose()

    async def _frame(self, path: str, body: bytes, decode: Callable[[bytes], T]) -> T:
        answer = await self._request("POST", path, content=body, headers={"Content-Type": codec.MEDIA_TYPE})
        return self._read(path, answer.content, decode)

    def _read(self, path: str, data: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(data)
        except codec.BadFrame as error:
            raise UserError(f"{self.config.url}{path}: {error}") from None

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"{self.config.label}: {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            text = str(error).upper()
            if "CERTIFICATE" in text:
                raise UserError(f"{self.config.url}: its certificate is not trusted: {error}") from None
            if any(sign in text for sign in _NO_TLS):
                raise UserError(f"{self.config.url}: no TLS is spoken there: {error}. Check plm.url.") from None
            raise ConnectionError(f"{self.config.url}: {type(error).__name__}: {error}") from None
        if response.is_success:
            return response
        message = codec.as_error(response.content)
        if response.status_code == _PREFIX_LOST and _is_from_api(response):
            raise PrefixLost(message)
        if response.status_code in _BUSY or not _is_from_api(response):
            raise Busy(message, _seconds(response.headers.get("Retry-After")))
        if response.status_code == 409 and self._fingerprint is not None:
            raise FingerprintMismatch(self.config.label, _answering_plm(response.content), self._fingerprint)
        raise UserError(f"{self.config.url}{path}: {response.status_code}: {message}")


def _is_from_api(response: httpx.Response) -> bool:
    """Whether the PLM owner's API answered, not Serve's proxy for an application that is away or restarts."""
    if response.status_code not in (404, _PREFIX_LOST, 500):
        return True
    with suppress(msgspec.MsgspecError, KeyError, TypeError):
        return msgspec.json.decode(response.content)["error"]["type"] == "line_error"
    return False


def _matches(outcome: Stepped, step: Step, card: ModelCard) -> bool:
    expected = (step.states + step.draft, card.hidden_size)
    return outcome.state_NH.shape == expected and len(outcome.drafted) == step.draft


def _messages(steps: Sequence[Step], max_steps: int, max_rows: int, max_tokens: int) -> Iterator[list[Step]]:
    """The steps in order, in messages that the PLM owner accepts."""
    message: list[Step] = []
    rows = tokens = 0
    for step in steps:
        new_rows, new_tokens = step.states + step.draft, len(step.tokens)
        full = len(message) >= max_steps or rows + new_rows > max_rows or tokens + new_tokens > max_tokens
        if message and full:
            yield message
            message, rows, tokens = [], 0, 0
        message.append(step)
        rows, tokens = rows + new_rows, tokens + new_tokens
    yield message


async def _in_turn(calls: Iterable[Callable[[], Awaitable[T]]]) -> AsyncIterator[T]:
    """What calls return, one after the other; from the second on, one that is `Busy` is repeated."""
    for number, call in enumerate(calls):
        waited = 0.0
        while True:
            try:
                answer = await call()
                break
            except Busy as busy:
                waited += busy.retry_after
                if not number or waited > _LONGEST_WAIT:
                    raise
                await sleep(busy.retry_after)
        yield answer


def _requests(
    batch: ExtractBatch, max_rows: int, max_tokens: int, max_bytes: int, row_bytes: int = 0
) -> Iterator[ExtractBatch]:
    """The batch in order, in requests within the limits, each with its prefix; a sequence above them goes alone.

    Args:
        row_bytes: sent for every representation.
    """
    token_limit = max_tokens - len(batch.prefix)
    empty = _HEADER_BYTES + _TOKEN_BYTES * len(batch.prefix)
    sequences: list[list[int]] = []
    starts: list[int] = []
    rows, tokens, size = 0, 0, empty
    for sequence, begin in zip(batch.token_ids, batch.first, strict=True):
        for start in range(begin, len(sequence), max_rows):
            ids = sequence[: start + max_rows]  # states do not depend on later tokens
            new_rows = len(ids) - start
            new_size = _TOKEN_BYTES * len(ids) + _SEQUENCE_BYTES + row_bytes * new_rows
            full = rows + new_rows > max_rows or tokens + len(ids) > token_limit or size + new_size > max_bytes
            if sequences and full:
                yield replace(batch, token_ids=sequences, first=starts)
                sequences, starts, rows, tokens, size = [], [], 0, 0, empty
            sequences.append(ids)
            starts.append(start)
            rows, tokens, size = rows + new_rows, tokens + len(ids), size + new_size
    yield replace(batch, token_ids=sequences, first=starts)


def _key(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        key = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plm.key_file={file}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not key:
        raise UserError(f"plm.key_file={file}: is empty; it must hold the key.")
    if not key.isascii() or len(key.split()) > 1:
        raise UserError(f"plm.key_file={file}: holds more than a key: one word of ASCII characters is expected.")
    return key


def _trusted(ca_file: str | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(Path(ca_file).expanduser()))
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"plm.ca_file={ca_file}: cannot be read: {reason}.") from None


def _answering_plm(content: bytes) -> str:
    """The PLM that a response of status 409 names."""
    with suppress(msgspec.MsgspecError, KeyError, TypeError):
        return str(msgspec.json.decode(content)["error"]["found"])
    return "another one"


def _seconds(value: str | None) -> float:
    try:
        return min(60.0, max(0.1, float(value or 1.0)))
    except ValueError:
        return 1.0
