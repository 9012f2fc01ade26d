"""A PLM owner of another organisation, over HTTPS: frames of the line up and down, a key in every request.

What goes wrong is told apart: `UserError` what only a person can mend (key, fingerprint, a text too long), `Busy` what
passes by itself (quota, no slot, a service that is shut down), `ConnectionError` a line that is dead.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import Field

from pema_ray.config import Section
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ExtractBatch, LMHeadBundle, ModelCard, codec
from pema_ray.line.stepping import Busy, Step, Stepped

T = TypeVar("T")
_TOO_MUCH = (429, 502, 503, 504)


class RemoteConfig(Section):
    """Where the PLM owner's service is, and how it is spoken to."""

    url: str
    """Such as `https://plm.example.org`."""
    key_file: str | None = None
    """A file that holds the key, and nothing else."""
    ca_file: str | None = None
    """Certificates to trust instead of the system's."""
    fingerprint: str | None = None
    """The PLM that is expected; any other is refused."""
    timeout_seconds: float = Field(default=90.0, gt=0)
    """Of one request; longer than the PLM owner lets a step wait, so that its own answer is heard."""

    def key(self) -> str | None:
        """The key.

        Raises:
            UserError: there is no such file, or it is empty.
        """
        if self.key_file is None:
            return None
        try:
            key = Path(self.key_file).expanduser().read_text().strip()
        except OSError as error:
            raise UserError(f"key_file={self.key_file}: cannot be read: {error.strerror}.") from None
        if not key:
            raise UserError(f"key_file={self.key_file}: is empty; it must hold the key.")
        return key


class RemotePLM:
    """Sessions, extraction and the LM head of a `plm_owner` service: a `Stepper`.

    Args:
        transport: httpx's own by default.
    """

    def __init__(self, config: RemoteConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.config = config
        headers = {} if (key := config.key()) is None else {"Authorization": f"Bearer {key}"}
        if config.fingerprint is not None:
            headers["X-PLM-Fingerprint"] = config.fingerprint
        self._http = httpx.AsyncClient(
            base_url=config.url,
            headers=headers,
            verify=_trusted(config.ca_file),
            timeout=httpx.Timeout(config.timeout_seconds, connect=min(10.0, config.timeout_seconds)),
            transport=transport,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
        )
        self._described: dict[str, Any] | None = None

    async def limits(self) -> dict[str, Any]:
        """The model card's entries, `max_session_tokens`, limits and quota."""
        if self._described is None:
            found: dict[str, Any] = (await self._ask("GET", "/v1/model")).json()
            # from here on it is this PLM: another in its place must not answer with states that mean nothing here
            self._http.headers["X-PLM-Fingerprint"] = str(found.get("fingerprint"))
            self._described = found
        return self._described

    async def describe(self) -> ModelCard:
        known = ("name", "fingerprint", "hidden_size", "vocab_size", "max_positions", "eos_token_ids")
        found = await self.limits()
        try:
            return ModelCard.from_dict({name: found[name] for name in known})
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.config.url}: is no PLM owner's service: its answer lacks {error}.") from None

    async def lm_head(self) -> LMHeadBundle:
        """The LM-head bundle.

        Raises:
            FingerprintMismatch: it is not that of the PLM which the service describes.
        """
        card = await self.describe()
        sent = (await self._ask("GET", "/v1/lm-head")).content
        bundle = LMHeadBundle.from_files(self._read("/v1/lm-head", sent, codec.decode_files))
        if bundle.card.fingerprint != card.fingerprint:
            raise FingerprintMismatch(f"The LM head of {self.config.url}", bundle.card.label, card.label)
        return bundle

    async def extract(self, batch: ExtractBatch) -> Any:
        """Representations `[N, H]` of the wanted positions.

        Raises:
            UserError, Busy, ConnectionError: as the module says.
        """
        rows = await self._frame("/v1/extract", codec.encode_extract(batch), codec.decode_rows)
        if len(rows) != batch.rows:
            raise UserError(f"{self.config.url}: sent {len(rows)} rows for a batch of {batch.rows}.")
        return rows

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        limits = (await self.limits()).get("limits", {})
        messages = list(_messages(steps, limits.get("max_steps", 1), limits.get("max_rows", 1)))
        answers = await asyncio.gather(*(self._step(message) for message in messages), return_exceptions=True)
        outcomes: list[Stepped | Exception] = []
        for message, answer in zip(messages, answers, strict=True):
            if isinstance(answer, Exception) and len(messages) > 1:
                outcomes += [answer] * len(message)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                outcomes += answer
        return outcomes

    async def _step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        decode = partial(codec.decode_stepped, refused=UserError)
        outcomes = await self._frame("/v1/sessions/step", codec.encode_steps(steps), decode)
        if len(outcomes) != len(steps):
            raise UserError(f"{self.config.url}: answered {len(outcomes)} of {len(steps)} steps.")
        return outcomes

    async def close(self, sessions: Sequence[str]) -> None:
        if sessions:
            await self._ask("POST", "/v1/sessions/close", json=list(sessions))

    async def end(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _frame(self, path: str, body: bytes, decode: Callable[[bytes], T]) -> T:
        answer = await self._ask("POST", path, content=body, headers={"Content-Type": codec.MEDIA_TYPE})
        return self._read(path, answer.content, decode)

    def _read(self, path: str, data: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(data)
        except codec.BadFrame as error:
            raise UserError(f"{self.config.url}{path}: {error}") from None

    async def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **options)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            if "CERTIFICATE" in str(error).upper():
                raise UserError(f"{self.config.url}: its certificate is not trusted: {error}") from None
            raise ConnectionError(f"{self.config.url}: {type(error).__name__}: {error}") from None
        if response.is_success:
            return response
        said = codec.as_error(response.content)
        if response.status_code in _TOO_MUCH:
            raise Busy(said, _seconds(response.headers.get("Retry-After")))
        raise UserError(f"{self.config.url}{path}: {response.status_code}: {said}")


def _messages(steps: Sequence[Step], most_steps: int, most_rows: int) -> Iterator[list[Step]]:
    """The steps in their order, in messages that the PLM owner takes."""
    message: list[Step] = []
    rows = 0
    for step in steps:
        wanted = step.states + step.draft
        if message and (len(message) >= most_steps or rows + wanted > most_rows):
            yield message
            message, rows = [], 0
        message.append(step)
        rows += wanted
    yield message


def _trusted(ca_file: str | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=str(Path(ca_file).expanduser()))
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"ca_file={ca_file}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _seconds(told: str | None) -> float:
    try:
        return min(60.0, max(0.1, float(told or 1.0)))
    except ValueError:
        return 1.0
