"""Keys of those who may edit a served memory. Knows nothing else."""

from __future__ import annotations

import hashlib
import secrets

_KEY_PREFIX = "pluglm-"


def new_key() -> tuple[str, str]:
    """A fresh key for editors, and the hash that is kept of it."""
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """SHA-256: enough for 256 random bits, which nobody can guess one by one."""
    return hashlib.sha256(key.encode()).hexdigest()
