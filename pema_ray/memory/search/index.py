"""The index of a datastore: lists and codes learned once (faiss), then one file per part. N rows, H hidden.

A part is `shards_per_part` consecutive shards. Every part has the same lists and codes, so that merging the results
of all parts equals searching one index. A resumed build adds the missing parts; the same settings give the same
bytes. `exact` has no files but `index.json`. Imports no Ray.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory
from pema_ray.memory.search.config import IndexConfig
from pema_ray.memory.search.nearest import DatastorePart, SearchOptions, require_faiss
from pema_ray.memory.shards import MemoryRows
from pema_ray.runtime.files import atomic_file, remove_temporary_files, sha256_of

FILE, TRAINED, _PLAN = "index.json", "trained.faiss", "plan.json"
_REMEDY = "Run: pema-ray trime index (of a translation: pema-ray trime mt-datastore)"
_KEYS_PER_LIST = 40  # faiss warns below 39
_MAX_PQ_BYTES = 64
_BITS = {"ivf_pq": 8, "ivf_pq_fast": 4}  # of a code


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """`index.json`: the index and its datastore."""

    kind: str
    metric: str
    shards_per_part: int
    lists: int
    pq_bytes: int
    datastore: str
    """The datastore's plan hash and checksums, hashed: another datastore is refused."""
    fingerprint: str
    rows: int
    bytes: int
    files: dict[str, str]
    """Name -> sha256."""


def identity(store: ExternalMemory) -> str:
    """16 hex digits of a datastore's contents."""
    manifest = store.manifest
    contents = [manifest.plan_hash, manifest.key_dtype, [(shard.name, shard.sha256) for shard in manifest.shards]]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def parts_of(shards: int, shards_per_part: int) -> list[range]:
    """The shard numbers of each part."""
    return [range(begin, min(begin + shards_per_part, shards)) for begin in range(0, shards, shards_per_part)]


class IndexBuild:
    """One index to be built: `prepare` first, then `add` for each part that is `missing`, then `finish`."""

    def __init__(self, folder: Path, store: ExternalMemory, config: IndexConfig, seed: int) -> None:
        self.folder, self.store, self.config, self.seed = folder, store, config, seed
        rows, self.hidden = len(store), store.manifest.hidden_size
        self.lists, self.pq_bytes = 0, 0
        if config.kind != "exact":
            max_lists = max(1, rows // _KEYS_PER_LIST)
            self.lists = config.lists or min(int(4 * math.sqrt(rows)), max_lists)
            sample_rows = min(config.train_rows, rows)
            if self.lists > sample_rows:
                raise UserError(
                    f"index.lists={self.lists:,}: they are learned from {sample_rows:,} keys (index.train_rows, of "
                    f"{rows:,} in the datastore). Lower it."
                )
        if config.kind in _BITS:
            self.pq_bytes = self._pq_bytes()
            if min(config.train_rows, rows) < 2 ** _BITS[config.kind]:
                raise UserError(
                    f"index.kind={config.kind} needs {2 ** _BITS[config.kind]} keys to learn from at least, there are "
                    f"{min(config.train_rows, rows):,}: take exact, or raise index.train_rows."
                )

    def _pq_bytes(self) -> int:
        """Bytes of a key's codes; each code covers equally many of its numbers (by default at least two, of 4 bits)."""
        codes_per_byte = 8 // _BITS[self.config.kind]
        limit = min(_MAX_PQ_BYTES, self.hidden // codes_per_byte**2)
        divisors = (m for m in range(1, limit + 1) if self.hidden % (codes_per_byte * m) == 0)
        pq_bytes = self.config.pq_bytes or max(divisors, default=1)
        if self.hidden % codes_per_byte:
            raise UserError(f"index.kind=ivf_pq_fast needs keys of an even size, not of {self.hidden}: take ivf_pq.")
        if self.hidden % (codes_per_byte * pq_bytes):
            half = "half of " if codes_per_byte == 2 else ""
            raise UserError(f"index.pq_bytes={pq_bytes} does not divide {half}the keys' size {self.hidden}.")
        return pq_bytes

    @property
    def parts(self) -> list[range]:
        return parts_of(len(self.store.manifest.shards), self.config.shards_per_part)

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts without a file."""
        if self.config.kind == "exact":
            return []
        return [number for number in range(len(self.parts)) if not self.path(number).exists()]

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.faiss"

    def key(self) -> str:
        """16 hex digits of the datastore and all settings that decide the index's bytes."""
        settings = [self.config.kind, self.config.metric, self.config.shards_per_part, self.lists, self.pq_bytes]
        settings += [self.config.train_rows, self.seed, identity(self.store)]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def prepare(self) -> None:
        """Prepare the folder and learn lists and codes, unless that is done. Files of other settings are removed."""
        plan = self.folder / _PLAN
        if not plan.exists() or plan.read_text() != self.key():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            plan.write_text(self.key())
        (self.folder / FILE).unlink(missing_ok=True)
        remove_temporary_files(self.folder)
        if self.config.kind != "exact" and not (self.folder / TRAINED).exists():
            _write(self._learn(), self.folder / TRAINED)

    def _learn(self) -> Any:
        faiss = require_faiss()
        inner = self.config.metric == "inner_product"
        code = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
        nearest = (faiss.IndexFlatIP if inner else faiss.IndexFlatL2)(self.hidden)
        if self.config.kind == "ivf_pq":
            index = faiss.IndexIVFPQ(nearest, self.hidden, self.lists, self.pq_bytes, 8, code)
        elif self.config.kind == "ivf_pq_fast":
            index = faiss.IndexIVFPQFastScan(nearest, self.hidden, self.lists, 2 * self.pq_bytes, 4, code)
            index.by_residual = not inner  # for inner products, codes of the keys themselves: one table for all lists
        else:
            index = faiss.IndexIVFFlat(nearest, self.hidden, self.lists, code)
        index.own_fields = True
        nearest.this.disown()
        index.cp.seed = self.seed + 1
        index.train(self._sample())
        return index

    def _sample(self) -> np.ndarray:
        """Keys to learn from, float32 `[n, H]`, the same for every build of this plan."""
        view, size = self.store.view(), min(self.config.train_rows, len(self.store))
        rows = np.random.default_rng(self.seed).choice(len(view), size, replace=False)
        return np.ascontiguousarray(view.key[np.sort(rows)])

    def add(self, number: int) -> None:
        """Write one part's file. May run in any process that sees both folders."""
        faiss = require_faiss()
        index = faiss.read_index(str(self.folder / TRAINED))
        for shard in self.parts[number]:
            index.add(np.ascontiguousarray(self.store.shard(self.store.manifest.shards[shard]).key[:]))
        _write(index, self.path(number))

    def finish(self) -> IndexInfo:
        """Write `index.json`, last of all."""
        assert not self.missing
        names = [] if self.config.kind == "exact" else [TRAINED, *(self.path(n).name for n in range(len(self.parts)))]
        info = IndexInfo(
            kind=self.config.kind,
            metric=self.config.metric,
            shards_per_part=self.config.shards_per_part,
            lists=self.lists,
            pq_bytes=self.pq_bytes,
            datastore=identity(self.store),
            fingerprint=self.store.manifest.fingerprint,
            rows=len(self.store),
            bytes=sum((self.folder / name).stat().st_size for name in names),
            files={name: sha256_of(self.folder / name) for name in names},
        )
        with atomic_file(self.folder / FILE) as temporary:
            temporary.write_text(json.dumps({n: getattr(info, n) for n in info.__slots__}, indent=1) + "\n")
        return info


def build_index(build: IndexBuild, on_part: Callable[[int], None] | None = None) -> IndexInfo:
    """Build the whole index in this process."""
    build.prepare()
    for number in build.missing:
        build.add(number)
        if on_part:
            on_part(number)
    return build.finish()


def read_info(folder: Path, store: ExternalMemory) -> IndexInfo:
    """The description of an index of this datastore.

    Raises:
        UserError: it is missing, damaged, or another datastore's.
    """
    path = folder / FILE
    try:
        info = IndexInfo(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{folder}: no index here ({FILE} is missing). {_REMEDY}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}. {_REMEDY}") from None
    if info.fingerprint != store.manifest.fingerprint:
        raise UserError(
            f"{folder}: the index of a datastore of model {info.fingerprint}, but {store.folder} was made by "
            f"{store.manifest.plm_label}. {_REMEDY}"
        )
    if info.datastore != identity(store):
        raise UserError(f"{folder}: the index of another datastore than {store.folder}. {_REMEDY}")
    return info


def load_parts(
    store: ExternalMemory, folder: Path | None, options: SearchOptions, numbers: Iterable[int] | None = None
) -> list[DatastorePart]:
    """Searchable parts of a datastore.

    Args:
        folder: of the index; None: every key is compared, all shards in one part.
        numbers: which parts; None: all.

    Raises:
        UserError: the index is missing, damaged, or another datastore's.
    """
    info = read_info(folder, store) if folder is not None else None
    counts = np.cumsum([0, *store.counts])
    ranges = parts_of(len(store.counts), info.shards_per_part if info else len(store.counts))
    loaded = []
    for number in range(len(ranges)) if numbers is None else numbers:
        rows: MemoryRows = store.read(ranges[number])
        index = None
        if info is not None and info.kind != "exact":
            assert folder is not None
            index = _read(folder / f"part-{number:05d}.faiss", info)
        loaded.append(DatastorePart(rows.key, rows.target, int(counts[ranges[number].start]), options, index))
    return loaded


def _write(index: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        require_faiss().write_index(index, str(temporary))


def _read(path: Path, info: IndexInfo) -> Any:
    if not path.exists():
        raise UserError(f"{path}: this part of the index is missing. Delete {path.parent / FILE}. {_REMEDY}")
    if sha256_of(path) != info.files.get(path.name):
        raise UserError(
            f"{path}: damaged (its checksum is not that of {FILE}). Delete the folder {path.parent}. {_REMEDY}"
        )
    return require_faiss().read_index(str(path))
