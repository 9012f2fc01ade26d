"""The description of a memory: schema version, PLM, task, row format, shards with checksums. Written last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pema_ray.errors import UserError
from pema_ray.line import ModelCard
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
_CHECKSUM = "checksum"


class ShardInfo(Section):
    """One Parquet file of rows."""

    name: str
    rows: int
    """Of targets."""
    prompt_rows: int = 0
    """Of prompts, at negative positions."""
    represents: int | None = None
    """Rows before equal ones were counted together; none: not deduplicated."""
    examples: int
    tokens: int
    """Token positions of its examples beyond the prompt prefix that all of them share, without padding."""
    padded_tokens: int
    """The same with padding."""
    bytes: int
    sha256: str


class Manifest(Section):
    """`manifest.json`. Two builds of the same memory give the same manifest."""

    schema_version: int = SCHEMA_VERSION
    plm_name: str
    fingerprint: str
    hidden_size: int
    vocab_size: int
    eos_token_id: int
    task: str
    split: str
    context: str
    key_dtype: str
    plan_hash: str
    prompt_from: int | None = None
    """Prompts have rows too, from this token of theirs on; none: targets only."""
    rows: int
    """Of targets."""
    examples: int
    rejected: int = 0
    """Examples that could not become rows; `rejected.parquet` names them."""
    shards: tuple[ShardInfo, ...] = Field(min_length=1)

    @property
    def represents(self) -> int:
        """Rows before equal ones were counted together."""
        return sum(shard.represents or shard.rows for shard in self.shards)

    @property
    def plm_label(self) -> str:
        return f"{self.plm_name} ({self.fingerprint})"

    def belongs_to(self, card: ModelCard) -> bool:
        return self.fingerprint == card.fingerprint

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically, with a checksum of itself."""
        fields = self.model_dump(mode="json")
        with atomic_file(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({**fields, _CHECKSUM: _checksum(fields)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `UserError` when there is no manifest, or none that this version can read."""
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no external memory here ({MANIFEST} is missing). Run build-memory.") from None
        except ValueError as error:  # broken JSON and broken UTF-8 are ValueErrors
            raise _damaged(path, str(error)) from None
        if not isinstance(fields, dict):
            raise _damaged(path, "it holds no fields")
        version = fields.get("schema_version")
        if isinstance(version, int) and version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {version}, this version reads {SCHEMA_VERSION}. Run build-memory again "
                "(finished shards are kept), or make it again by the pema-ray memory command that made it."
            )
        if fields.pop(_CHECKSUM, None) != _checksum(fields):
            raise _damaged(path, "its checksum is not that of its contents")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise _damaged(path, f"{'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, how: str) -> UserError:
    return UserError(
        f"{path}: damaged manifest: {how}. Run build-memory again (finished shards are kept), or make it again by the "
        "pema-ray memory command that made it."
    )
