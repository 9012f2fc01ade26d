"""Verifies, converts, merges and imports memories. N rows, H hidden.

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
from pema_ray.memory.shards import MemoryRows, save_shard
from pema_ray.memory.specification import shard_name
from pema_ray.tasks.sources import name_of_example

Progress = Callable[[ShardInfo], None]
_IMPORTED_ROWS = 65_536  # rows a shard, of imported memories


def verify(folder: Path, on_shard: Progress = lambda info: None) -> list[str]:
    """The problems of a memory, one message each; none if it is sound.

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
    for name, counted, stated in (("rows", total, len(memory)), ("examples", examples, memory.manifest.examples)):
        if counted != stated:
            problems.append(f"{folder / MANIFEST}: {stated:,} {name} in all, but its shards have {counted:,}")
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
        converted = replace(rows, key=encode(rows.key[:], key_dtype))
        shards.append(save_shard(target / info.name, converted, info.examples, info.tokens, info.padded_tokens))
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
        manifest = memory.manifest
        if manifest.fingerprint != first.fingerprint:
            raise FingerprintMismatch(f"The memory {memory.folder}", manifest.plm_label, first.plm_label)
        for name in ("key_dtype", "eos_token_id", "context", "prompt_from"):
            value, expected = getattr(manifest, name), getattr(first, name)
            if value != expected:
                hint = " Convert one of them first." if name == "key_dtype" else ""
                raise UserError(
                    f"{memory.folder}: {name} is {value}, that of {memories[0].folder} is {expected}.{hint}"
                )
    _claim(target)
    shards: list[ShardInfo] = []
    owner: dict[int, int] = {}  # example_id → number of its memory
    weighted = any(info.represents is not None for memory in memories for info in memory.manifest.shards)
    for number, memory in enumerate(memories):
        for info in memory.manifest.shards:
            rows = memory.shard(info, prompts=True)
            if weighted and rows.weight is None:
                rows = replace(rows, weight=np.ones(len(rows), np.int32))
            for example in np.unique(rows.example_id).tolist():
                if owner.setdefault(example, number) != number:
                    name, folder = name_of_example(example).capitalize(), memories[owner[example]].folder
                    raise UserError(f"{name} is in {folder} and in {memory.folder}: merge takes it once.")
            path = target / shard_name(len(shards))
            shards.append(save_shard(path, rows, info.examples, info.tokens, info.padded_tokens))
            on_shard(shards[-1])
    changes = {
        "task": "+".join(dict.fromkeys(memory.manifest.task for memory in memories)),
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

    They have no header: shape and dtypes come from the arguments. They do not record which rows belong together, so
    each row becomes an example of its own, nor which PLM made them: `card` is taken on trust.

    Args:
        rows: N; H is the card's.
        keys_dtype, targets_dtype: of the arrays; by default inferred from the files' sizes. The published code writes
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
        invalid = np.flatnonzero((tokens < 0) | (tokens >= card.vocab_size))
        if len(invalid):
            raise UserError(
                f"{targets}: row {start + invalid[0]} holds {tokens[invalid[0]]}, no token of {card.name} (0 to "
                f"{card.vocab_size - 1}). Is {ids.dtype} its dtype? The published code's int16 ids overflow."
            )
        index = np.arange(part.start, part.stop, dtype=np.int64)
        block = MemoryRows(
            encode(np.asarray(stored[part], np.float32), key_dtype),
            tokens.astype(np.int32),
            index,
            np.zeros(len(index), np.int32),
        )
        shards.append(save_shard(target / shard_name(number), block, len(block)))
        on_shard(shards[-1])
    manifest = Manifest(
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
    manifest.save(target)
    return manifest


def _memmap(path: Path, dtype: str | None, names: Sequence[str], rows: int, columns: int) -> np.ndarray:
    """An array of numbers `[rows, columns]`; without `dtype`, of the named dtype that matches the file's size."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    size, count = path.stat().st_size, rows * columns
    try:
        candidates = [np.dtype(dtype)] if dtype else [np.dtype(name) for name in names]
    except TypeError:
        raise UserError(f"'{dtype}' is no number format: write {', '.join(names)}.") from None
    matches = [candidate for candidate in candidates if rows > 0 and count * candidate.itemsize == size]
    if not matches:
        sizes = " or ".join(f"{count * candidate.itemsize:,} bytes as {candidate}" for candidate in candidates)
        raise UserError(f"{path}: {rows:,} × {columns:,} numbers take {sizes}, it has {size:,}.")
    return np.memmap(path, matches[0], "r", shape=(rows, columns))


# ── writing ─────────────────────────────────────────────────────────────────


def _claim(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty. Choose another folder for the new memory.")
    folder.mkdir(parents=True, exist_ok=True)


def _finish(folder: Path, source: Manifest, shards: Sequence[ShardInfo], changes: Mapping[str, object]) -> Manifest:
    counts = {"rows": sum(info.rows for info in shards), "examples": sum(info.examples for info in shards)}
    manifest = source.model_copy(update={**counts, **changes, "shards": tuple(shards)})
    manifest.save(folder)
    return manifest


def _derived(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
