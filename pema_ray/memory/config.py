"""Settings of building an external memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pema_ray.runtime.settings import Section, Split


class BuildMemoryConfig(Section):
    """The external memory: PLM actors, batches, rows."""

    actors: int = Field(default=1, ge=1)
    """Actors that load the PLM (`plm.name`), or are clients of a served PLM."""
    max_actors: int | None = Field(default=None, ge=1)
    """Maximum number of actors while shards wait and the cluster has room; none: always `actors`."""
    cpus_per_actor: float = Field(default=2, gt=0)
    """CPUs that one actor with its own PLM requests from Ray; a client of a served PLM requests 0.25."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that one actor with its own PLM requests from Ray."""
    requests_in_flight: int = Field(default=4, ge=1)
    """Concurrent requests of one actor to the PLM owner."""
    patience_seconds: float = Field(default=600.0, gt=0)
    """Maximum wait of a request while over quota or without connection; then the build ends. A new start resumes it."""
    examples_per_shard: int = Field(default=256, ge=1)
    """Examples per Parquet file: the unit of work and of resuming."""
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Maximum token positions (with padding, without the shared prompt prefix) in one request to the PLM, which may
    compute it in several passes."""
    key_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Number format of the representations: 16 bits are half the disk, `int8` (a scale for each row) a quarter."""
    context: Literal["teacher_forced", "generated"] = "teacher_forced"
    """Of train and dev: the gold prefix, or the PLM's own continuation (it sees no target). test is teacher-forced."""
    sequences: int = Field(default=32, ge=1)
    """Sequences that an actor decodes together when the context is generated."""
    deduplicate: bool = False
    """Keep equal rows (same text before, same token) of the training split once, with their number as a weight. The
    process that plans then holds all training pairs, some KB each."""
    prompts: bool = False
    """Keep rows of every prompt too, from the first token that differs; `train.look_back` needs them."""
    splits: tuple[Split, ...] = ("train", "dev", "test")
    """`train` needs train and dev, `evaluate` needs `generate.split`."""
    max_rejected: int = Field(default=0, ge=0)
    """Maximum number of bad examples (too long, empty target) of a split that are set aside; more fail the build."""
    overwrite: bool = False
    """Replace a memory that was built with other settings, instead of refusing."""

    @model_validator(mode="after")
    def _has_room_to_grow(self) -> BuildMemoryConfig:
        if self.max_actors is not None and self.max_actors < self.actors:
            raise ValueError(f"max_actors ({self.max_actors}) must not be below actors ({self.actors})")
        return self

    @model_validator(mode="after")
    def _keeps_whole_sequences(self) -> BuildMemoryConfig:
        if self.prompts and (self.context != "teacher_forced" or self.deduplicate):
            raise ValueError("prompts keeps whole sequences: it needs context teacher_forced and no deduplicate")
        return self
