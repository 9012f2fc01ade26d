"""Editors' keys of a served memory. Knows nothing else."""

from __future__ import annotations

import hashlib
import secrets

_KEY_PREFIX = "pluglm-"


def new_key() -> tuple[str, str]:
    """(a new key for an editor, its hash for the service)."""
    key = _KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """SHA-256, which suffices for 256 random bits: they cannot be guessed."""
    return hashlib.sha256(key.encode()).hexdigest()
