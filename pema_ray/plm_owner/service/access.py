"""Access to a PLM owner's public service: keys, quotas, and an audit log without contents.

A key is a random string, shown once; the file of keys holds only its SHA-256. Quotas count over a sliding minute. A
thread of its own reads and writes files and hashes keys: the event loop waits for no disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import Field, field_validator

from pema_ray.errors import UserError
from pema_ray.runtime.files import temporary_beside
from pema_ray.runtime.settings import Section, validate

logger = logging.getLogger(__name__)
_PREFIX = "pema-"
_MINUTE = 60.0


class Quota(Section):
    """What one data owner may use; none: unlimited."""

    rows_per_minute: int | None = Field(default=None, ge=0)
    """Representations sent down the line, those that a gradient is taken of, and positions of texts whose keys and
    values are read."""
    tokens_per_minute: int | None = Field(default=None, ge=0)
    """Tokens sent up the line: three times those of a gradient; and positions of prefixes that are put."""
    sessions: int | None = Field(default=None, ge=0)
    """Open at the same time."""


class Client(Section):
    """A data owner with a key."""

    name: str = Field(min_length=1, max_length=100)
    key_sha256: str
    quota: Quota = Quota()

    @field_validator("key_sha256")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise ValueError("64 hexadecimal digits are expected, as `pema-ray serve-key` writes them")
        return value


class Clients(Section):
    """The file of keys."""

    clients: tuple[Client, ...] = ()

    @field_validator("clients")
    @classmethod
    def _are_distinct(cls, clients: tuple[Client, ...]) -> tuple[Client, ...]:
        for name in ("name", "key_sha256"):
            values = [getattr(client, name) for client in clients]
            if len(set(values)) < len(values):
                raise ValueError(f"two clients have the same {name}")
        return clients


def new_key() -> tuple[str, str]:
    """A fresh key, and its hash."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """SHA-256: enough for 256 random bits, which no search finds."""
    return hashlib.sha256(key.encode()).hexdigest()


class Refused(Exception):
    """A refused request: its HTTP status and the message for the caller.

    Attributes:
        retry_after: seconds after which the same request may succeed; none: never.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Account:
    """What one data owner has used of its quota in the last minute, and the memory of its running requests.

    Attributes:
        sessions: the open ones, with the time of their last step.
        requests: the number of running ones.
        reserved_bytes: of their bodies and answers.
        prefix_bytes: of the largest prefix that was put, which a gradient is as large as.
    """

    def __init__(self, client: Client, clock: Callable[[], float] = time.monotonic) -> None:
        self.client, self._clock = client, clock
        self._used: dict[str, deque[tuple[float, int]]] = {}
        self._sums: dict[str, int] = {}
        self.sessions: dict[str, float] = {}
        self.requests = self.reserved_bytes = self.prefix_bytes = 0

    def spend(self, rows: int, tokens: int, opens: set[str]) -> float:
        """Count a request before it runs, and return the time; a refused one does not count.

        Raises:
            Refused: 413 if it can never fit, 429 if it does not fit now.
        """
        quota, now = self.client.quota, self._clock()
        amounts = {"rows": (rows, quota.rows_per_minute), "tokens": (tokens, quota.tokens_per_minute)}
        self._afford(amounts, now)
        fresh = opens - self.sessions.keys()
        if quota.sessions is not None and len(self.sessions) + len(fresh) > quota.sessions:
            raise Refused(429, f"Your quota is {quota.sessions} sessions at a time; close one first.", 1.0)
        self._count(amounts, now)
        self.sessions |= dict.fromkeys(opens, now)
        return now

    def refund(self, spent_at: float, rows: int, tokens: int) -> None:
        """Refund what `spend` counted at the time that it returned, for work that the PLM did not do."""
        for name, amount in (("rows", rows), ("tokens", tokens)):
            for place in reversed(range(len(used := self._used[name]))):
                if used[place][0] == spent_at:  # older entries have expired
                    used[place] = spent_at, used[place][1] - amount
                    self._sums[name] -= amount
                    break

    def spend_head(self, limit: int) -> None:
        """Count a requested LM head, of at most `limit` a minute.

        Raises:
            Refused: 429.
        """
        amounts, now = {"LM heads": (1, limit)}, self._clock()
        self._afford(amounts, now)
        self._count(amounts, now)

    def _afford(self, amounts: Mapping[str, tuple[int, int | None]], now: float) -> None:
        for name, (amount, limit) in amounts.items():
            self._forget(name, now)
            if limit is None:
                continue
            if amount > limit:
                raise Refused(413, f"{amount} {name} in one request; your quota is {limit} a minute.")
            if self._sums.get(name, 0) + amount > limit:
                wait = self._seconds_until(name, amount, limit, now)
                raise Refused(429, f"Your quota is {limit} {name} a minute; retry in {wait:.0f} s.", wait)

    def _count(self, amounts: Mapping[str, tuple[int, int | None]], now: float) -> None:
        for name, (amount, _) in amounts.items():
            self._used.setdefault(name, deque()).append((now, amount))
            self._sums[name] = self._sums.get(name, 0) + amount

    def forget_idle(self, seconds: float) -> None:
        """Stop counting sessions without steps for `seconds`."""
        oldest = self._clock() - seconds
        self.sessions = {name: at for name, at in self.sessions.items() if at >= oldest}

    def _forget(self, name: str, now: float) -> None:
        used = self._used.get(name, ())
        while used and used[0][0] <= now - _MINUTE:
            self._sums[name] -= used.popleft()[1]

    def _seconds_until(self, name: str, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` is free again."""
        over = self._sums[name] + amount - limit
        for at, spent in self._used[name]:
            over -= spent
            if over <= 0:
                return max(1.0, at + _MINUTE - now)
        return _MINUTE


class Reservation:
    """The memory of one request, from its first byte until its answer is sent: a context manager.

    Args:
        max_requests: of the account, running at the same time.
        max_bytes: of all of them; a request that runs alone is always allowed.

    Raises:
        Refused: 429, on entering; the data owner has `max_requests` running.
    """

    def __init__(self, account: Account, max_requests: float, max_bytes: float) -> None:
        self._account, self._max_requests, self._max_bytes = account, max_requests, max_bytes
        self._bytes = 0

    def __enter__(self) -> Reservation:
        if self._account.requests >= self._max_requests:
            raise Refused(429, f"{self._max_requests} requests of yours are under way; retry after one.", 1.0)
        self._account.requests += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._account.requests -= 1
        self._account.reserved_bytes -= self._bytes

    def add(self, size: int) -> None:
        """Reserve more bytes: of the body on arrival, of the answer before it is made.

        Raises:
            Refused: 429, too many with the data owner's other requests.
        """
        others = self._account.reserved_bytes - self._bytes
        if others and others + self._bytes + size > self._max_bytes:
            raise Refused(429, f"Your requests under way hold {others / 2**20:.0f} MiB; retry after one.", 1.0)
        self._account.reserved_bytes += size
        self._bytes += size


class Access:
    """All data owners with a key.

    Args:
        keys: the YAML file of keys (`Clients`).
        audit: a file that gets one JSON line per request; none keeps no log.
    """

    def __init__(self, keys: Path, audit: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._audit, self._clock = keys, audit, clock
        self._accounts: dict[str, Account] = {}
        self._read_at: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="access")
        self._audit_file: TextIO | None = None
        self.reload()

    async def admit(self, authorization: str | None) -> Account:
        """`account`, without waiting for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.account, authorization)

    async def note(self, **entry: Any) -> None:
        """`log`, without waiting for the disk; a cancelled caller does not stop it."""
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(self._thread, lambda: self.log(**entry)))

    def reload(self) -> None:
        """Read the file of keys again; remaining data owners keep their usage. The next request reads a changed file.

        Raises:
            UserError: the file is missing or broken; nothing changes.
        """
        self._read_at = self._changed_at()
        clients = _read(self._keys)
        accounts = {}
        for client in clients:
            existing = (a for a in self._accounts.values() if a.client.name == client.name)
            account = next(existing, None) or Account(client, self._clock)
            account.client = client
            accounts[client.key_sha256] = account
        self._accounts = accounts

    def account(self, authorization: str | None) -> Account:
        """Whose request this is.

        Raises:
            Refused: 401, no key or an unknown one.
        """
        if self._changed_at() != self._read_at:
            try:
                self.reload()
            except UserError as error:  # known keys stay valid until the file is readable again
                logger.error("%s", error)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Refused(401, "A key is needed: Authorization: Bearer pema-…")
        account, key_sha256 = None, hash_of(key.strip())
        for candidate_sha256, candidate in self._accounts.items():  # all of them, so that the time reveals nothing
            if secrets.compare_digest(candidate_sha256, key_sha256):
                account = candidate
        if account is None:
            raise Refused(401, "This key is not known here.")
        return account

    def _changed_at(self) -> tuple[int, int] | None:
        try:
            status = self._keys.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def log(self, **entry: Any) -> None:
        """One line of the audit log: who, what, how much, how long; never a token, a state or a key."""
        if self._audit is None:
            return
        line = json.dumps({"time": round(time.time(), 3), **entry})
        try:
            file = self._open_audit(self._audit)
            file.write(line + "\n")
            file.flush()
        except OSError as error:  # a full disk must be reported, but not end the service
            logger.error("%s: the audit log cannot be written: %s; lost: %s", self._audit, error.strerror, line)
            self._close_audit()

    def _open_audit(self, audit: Path) -> TextIO:
        """The audit file, which stays open until it is moved away."""
        if self._audit_file is not None:
            try:
                moved = not os.path.samestat(os.stat(audit), os.fstat(self._audit_file.fileno()))
            except FileNotFoundError:
                moved = True
            if moved:
                self._close_audit()
        if self._audit_file is None:
            self._audit_file = audit.open("a")
        return self._audit_file

    def _close_audit(self) -> None:
        file, self._audit_file = self._audit_file, None
        if file is not None:
            with suppress(OSError):  # closing retries failed writes
                file.close()


def add_client(keys: Path, name: str, quota: Quota) -> str:
    """Add a data owner to the file of keys, or give an existing one a new key; returns the key, which is not stored.

    Args:
        quota: for an existing data owner, only given limits change.

    Raises:
        UserError: the file is broken, or cannot be written.
    """
    clients = _read(keys) if keys.exists() else ()
    previous = next((client.quota for client in clients if client.name == name), Quota())
    quota = previous.model_copy(update=quota.model_dump(exclude_none=True))
    key, key_sha256 = new_key()
    unchanged = [client for client in clients if client.name != name]
    updated = Clients(clients=(*unchanged, Client(name=name, key_sha256=key_sha256, quota=quota)))
    content = updated.model_dump(mode="json", exclude_none=True)
    _write_private(keys, yaml.safe_dump(content, sort_keys=False))
    return key


def _read(keys: Path) -> tuple[Client, ...]:
    try:
        data = yaml.safe_load(keys.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{keys}: cannot be read: {reason}. `pema-ray serve-key` makes such a file.") from None
    return validate(Clients, data or {}, str(keys)).clients


def _write_private(path: Path, text: str) -> None:
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
