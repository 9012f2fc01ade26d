"""Looks at finished memories and makes new ones of them: verify, convert, merge, import. N rows, H hidden.

A new memory is written shard by shard into a folder of its own, its manifest last: a stopped command leaves no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory.codec import KeyDtype, encode
from pema_ray.memory.external_memory import ExternalMemory
from pema_ray.memory.manifest import MANIFEST, Manifest, ShardInfo
from pema_ray.memory.shards import MemoryRows, write_shard
from pema_ray.tasks.sources import name_of_example

Progress = Callable[[ShardInfo], None]
_IMPORTED_ROWS = 65_536  # rows a shard, of imported memories


def verify(folder: Path, on_shard: Progress = lambda info: None) -> list[str]:
    """Everything that is wrong with a memory, in words; nothing if it is sound.

    Reads every byte: checksums, row counts, finite keys, targets that the vocabulary has, rows of an example in order.

    Raises:
        UserError: there is no memory, or its manifest is damaged.
    """
    memory, problems = ExternalMemory.open(folder), []
    for info in memory.manifest.shards:
        try:
            rows = memory.shard(info, prompts=True)
            problems += [f"{folder / info.name}: {problem}" for problem in _faults(rows, memory.manifest)]
        except UserError as error:
            problems.append(str(error))
        on_shard(info)
    total, examples = (sum(getattr(info, name) for info in memory.manifest.shards) for name in ("rows", "examples"))
    for name, found, told in (("rows", total, len(memory)), ("examples", examples, memory.manifest.examples)):
        if found != told:
            problems.append(f"{folder / MANIFEST}: {told:,} {name} in all, but its shards have {found:,}")
    return problems


def _faults(rows: MemoryRows, manifest: Manifest) -> Iterator[str]:
    if rows.key.dtype != manifest.key_dtype:
        yield f"keys are {rows.key.dtype}, the manifest says {manifest.key_dtype}"
    if not np.isfinite(rows.key[:]).all():
        yield "a key is not finite"
    if rows.target.min() < 0 or rows.target.max() >= manifest.vocab_size:
        yield f"a target lies outside the vocabulary of {manifest.vocab_size:,}"
    same = rows.example_id[1:] == rows.example_id[:-1]
    steps = np.diff(rows.position)[same]
    if (steps < 1).any() if rows.weight is not None else (steps != 1).any():
        yield "rows of an example are not in order"
    if rows.weight is not None and rows.weight.min() < 1:
        yield "a row's weight is below 1"


def convert(source: Path, target: Path, key_dtype: KeyDtype, on_shard: Progress = lambda info: None) -> Manifest:
    """The same rows with keys in another number format.

    Raises:
        UserError: `target` is not empty, a shard is damaged, or a key does not fit the format.
    """
    memory = ExternalMemory.open(source)
    _claim(target)
    shards = []
    for info in memory.manifest.shards:
        rows = memory.shard(info, prompts=True)
        changed = replace(rows, key=encode(rows.key[:], key_dtype))
        shards.append(_write(target, info.name, changed, info))
        on_shard(shards[-1])
    changes = {"key_dtype": key_dtype, "plan_hash": _derived(memory.manifest.plan_hash, "convert", key_dtype)}
    return _finish(target, memory.manifest, shards, changes)


def merge(sources: Sequence[Path], target: Path, on_shard: Progress = lambda info: None) -> Manifest:
    """The rows of several memories of one PLM, one after the other.

    Raises:
        FingerprintMismatch: they belong to different PLMs.
        UserError: fewer than two, `target` is not empty, number formats or EOS differ, or an example is in two of them.
    """
    if len(sources) < 2:
        raise UserError("merge needs two memories or more.")
    memories = [ExternalMemory.open(source) for source in sources]
    first = memories[0].manifest
    for memory in memories[1:]:
        other = memory.manifest
        if other.fingerprint != first.fingerprint:
            raise FingerprintMismatch(f"The memory {memory.folder}", other.plm_label, first.plm_label)
        for name in ("key_dtype", "eos_token_id", "context", "prompt_from"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                way = " Convert one of them first." if name == "key_dtype" else ""
                raise UserError(f"{memory.folder}: {name} is {theirs}, that of {memories[0].folder} is {mine}.{way}")
    _claim(target)
    shards: list[ShardInfo] = []
    owner: dict[int, int] = {}
    weighted = any(info.represents is not None for memory in memories for info in memory.manifest.shards)
    for place, memory in enumerate(memories):
        for info in memory.manifest.shards:
            rows = memory.shard(info, prompts=True)
            if weighted and rows.weight is None:
                rows = replace(rows, weight=np.ones(len(rows), np.int32))
            for example in np.unique(rows.example_id).tolist():
                if owner.setdefault(example, place) != place:
                    other = memories[owner[example]].folder
                    name = name_of_example(example).capitalize()
                    raise UserError(f"{name} is in {other} and in {memory.folder}: merge takes it once.")
            shards.append(_write(target, f"shard-{len(shards):05d}.parquet", rows, info))
            on_shard(shards[-1])
    tasks = "+".join(dict.fromkeys(memory.manifest.task for memory in memories))
    changes = {
        "task": tasks,
        "rejected": sum(memory.manifest.rejected for memory in memories),
        "plan_hash": _derived(*(memory.manifest.plan_hash for memory in memories), "merge"),
    }
    return _finish(target, first, shards, changes)


def import_memmaps(
    keys: Path,
    targets: Path,
    rows: int,
    card: ModelCard,
    target: Path,
    keys_dtype: str | None = None,
    targets_dtype: str | None = None,
    key_dtype: KeyDtype = "float32",
    on_shard: Progress = lambda info: None,
) -> Manifest:
    """A memory from the published code's raw arrays `dstore_keys.npy [N, H]` and `dstore_vals.npy [N, 1]`.

    They carry no header: shape and numbers are as told. Neither do they say which rows belong together, so each row
    becomes an example of its own, nor which PLM made them: `card` is taken on trust.

    Args:
        rows: N; H is the card's.
        keys_dtype, targets_dtype: of the arrays; by default what the files' sizes say. The published code writes
            float32 keys with int32 ids, or float16 with int16 (`dstore_fp16`).

    Raises:
        UserError: a file is missing or has another size, or a target is no token (16-bit ids that overflowed).
    """
    stored = _memmap(keys, keys_dtype, ("float16", "float32"), rows, card.hidden_size)
    ids = _memmap(targets, targets_dtype, ("int16", "int32", "int64"), rows, 1)
    _claim(target)
    shards = []
    for number, start in enumerate(range(0, rows, _IMPORTED_ROWS)):
        part = slice(start, min(rows, start + _IMPORTED_ROWS))
        tokens = np.asarray(ids[part, 0], np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= card.vocab_size))
        if len(wrong):
            raise UserError(
                f"{targets}: row {start + wrong[0]} holds {tokens[wrong[0]]}, no token of {card.name} (0 to "
                f"{card.vocab_size - 1}). Is {ids.dtype} its dtype? The published code's int16 ids overflow."
            )
        index = np.arange(part.start, part.stop, dtype=np.int64)
        block = MemoryRows(
            encode(np.asarray(stored[part], np.float32), key_dtype),
            tokens.astype(np.int32),
            index,
            np.zeros(len(index), np.int32),
        )
        shards.append(_write(target, f"shard-{number:05d}.parquet", block))
        on_shard(shards[-1])
    described = Manifest(
        plm_name=card.name,
        fingerprint=card.fingerprint,
        hidden_size=card.hidden_size,
        vocab_size=card.vocab_size,
        eos_token_id=card.eos_token_ids[0],
        task="imported",
        split="train",
        context="generated",
        key_dtype=key_dtype,
        plan_hash=_derived(*(shard.sha256 for shard in shards), "import"),
        rows=rows,
        examples=rows,
        shards=tuple(shards),
    )
    return _finish(target, described, shards, {})


def _memmap(path: Path, dtype: str | None, known: Sequence[str], rows: int, columns: int) -> np.ndarray:
    """An array of numbers `[rows, columns]`; without `dtype`, of the known one that explains the file's size."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    found, count = path.stat().st_size, rows * columns
    try:
        chosen = [np.dtype(dtype)] if dtype else [np.dtype(name) for name in known]
    except TypeError:
        raise UserError(f"'{dtype}' is no number format: write {', '.join(known)}.") from None
    fitting = [numbers for numbers in chosen if rows > 0 and count * numbers.itemsize == found]
    if not fitting:
        sizes = " or ".join(f"{count * numbers.itemsize:,} bytes as {numbers}" for numbers in chosen)
        raise UserError(f"{path}: {rows:,} × {columns:,} numbers take {sizes}, it has {found:,}.")
    return np.memmap(path, fitting[0], "r", shape=(rows, columns))


# ── writing ─────────────────────────────────────────────────────────────────


def _claim(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty. Choose another folder for the new memory.")
    folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, name: str, rows: MemoryRows, of: ShardInfo | None = None) -> ShardInfo:
    size, digest = write_shard(folder / name, rows)
    examples = of.examples if of else len(rows)
    counts = (of.tokens, of.padded_tokens) if of else (0, 0)
    return ShardInfo(
        name=name,
        rows=rows.target_rows,
        prompt_rows=len(rows) - rows.target_rows,
        represents=rows.represents,
        examples=examples,
        tokens=counts[0],
        padded_tokens=counts[1],
        bytes=size,
        sha256=digest,
    )


def _finish(folder: Path, like: Manifest, shards: Sequence[ShardInfo], changes: Mapping[str, object]) -> Manifest:
    counts = {"rows": sum(info.rows for info in shards), "examples": sum(info.examples for info in shards)}
    manifest = like.model_copy(update={**counts, **changes, "shards": tuple(shards)})
    manifest.save(folder)
    return manifest


def _derived(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
