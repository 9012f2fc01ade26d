"""What a memory is: schema version, PLM, task, row format, shards with their checksums. Written last."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from pema_ray.config import Section
from pema_ray.errors import UserError
from pema_ray.line import ModelCard

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


class ShardInfo(Section):
    """One Parquet file of rows."""

    name: str
    rows: int
    represents: int | None = None
    """Rows before equal ones were counted together; none: they were not looked for."""
    examples: int
    tokens: int
    """Token positions of its examples beyond the prompt prefix that all of them share, without padding."""
    padded_tokens: int
    """The same with padding: what was paid."""
    bytes: int
    sha256: str


class Manifest(Section):
    """`manifest.json`. Holds nothing that differs between two builds of the same thing."""

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
    rows: int
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

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `UserError` when there is no manifest, or none that this version can read."""
        path = folder / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no external memory here ({MANIFEST} is missing). Run build-memory.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: damaged manifest: {where} {first['msg']}. Build the memory again.") from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {manifest.schema_version}, this version reads {SCHEMA_VERSION}.")
        return manifest
