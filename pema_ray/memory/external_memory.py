"""Reads an external memory. N rows, H hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory.codec import Keys
from pema_ray.memory.manifest import Manifest, ShardInfo
from pema_ray.memory.shards import MemoryRows, read_shard, weights_of


class ExternalMemory:
    """A finished memory: its manifest, and its rows shard by shard."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._checked: dict[str, tuple[int, int]] = {}

    @classmethod
    def open(cls, path: str | Path, card: ModelCard | None = None) -> ExternalMemory:
        """Open a memory's folder, or `ray://<name>`, a memory in the object store.

        Args:
            card: the PLM it will be used with.

        Raises:
            FingerprintMismatch: it was built by another PLM.
            UserError: there is no memory, or its manifest is damaged.
        """
        if str(path).startswith("ray:/"):  # a Path has lost the second slash
            from pema_ray.memory.published import open_published

            return open_published(str(path).removeprefix("ray:").lstrip("/"), card)
        memory = cls(Path(path), Manifest.read(Path(path)))
        memory.check_owner(card)
        return memory

    def check_owner(self, card: ModelCard | None) -> None:
        """Raise `FingerprintMismatch` if another PLM made these rows."""
        if card is not None and not self.manifest.belongs_to(card):
            raise FingerprintMismatch(f"The memory {self.folder}", self.manifest.plm_label, card.label)

    def __getstate__(self) -> dict[str, object]:
        """Without the checked files: another process checks them itself."""
        return {**self.__dict__, "_checked": {}}

    def __len__(self) -> int:
        return self.manifest.rows

    def shards(self, verify: bool = True, prompts: bool = False) -> Iterator[MemoryRows]:
        """Rows shard by shard, each checked against the manifest unless `verify` is off.

        A file's checksum is computed when it is first read, and again only when its size or time has changed.

        Args:
            prompts: with the rows of prompts, if the memory has them.

        Raises:
            UserError: a shard is missing, damaged, or has other rows than the manifest says.
        """
        for info in self.manifest.shards:
            yield self.shard(info, verify, prompts)

    def shard(self, info: ShardInfo, verify: bool = True, prompts: bool = False) -> MemoryRows:
        """One shard's rows; arguments and errors as in `shards`."""
        path, expected = self.folder / info.name, (info.rows + info.prompt_rows, self.manifest.hidden_size)
        rows = self._read(path, info.sha256) if verify else read_shard(path)
        if rows.key.shape != expected:
            raise UserError(f"{path}: holds rows {rows.key.shape}, the manifest says {expected}.")
        if rows.target_rows != info.rows:
            raise UserError(f"{path}: holds {rows.target_rows} rows of targets, the manifest says {info.rows}.")
        return rows if prompts else rows.of_targets

    def _read(self, path: Path, sha256: str) -> MemoryRows:
        if not path.exists():
            return read_shard(path, sha256)  # raises
        status = path.stat()
        version = status.st_size, status.st_mtime_ns
        rows = read_shard(path, None if self._checked.get(path.name) == version else sha256)
        self._checked[path.name] = version
        return rows

    @property
    def counts(self) -> list[int]:
        """Rows of each shard."""
        return [info.rows for info in self.manifest.shards]

    @property
    def mean_weight(self) -> float:
        """Mean number of occurrences of a row."""
        return sum(info.represents or info.rows for info in self.manifest.shards) / len(self)

    def read(self, shards: Sequence[int]) -> MemoryRows:
        """The rows of some shards, by number, one after the other; raises as `shards` does."""
        return MemoryRows.concatenate([self.shard(self.manifest.shards[number]) for number in shards])

    def load(self, max_examples: int | None = None, max_rows: int | None = None) -> MemoryRows:
        """Rows as one block in memory, in example order, up to `max_examples` examples and `max_rows` rows."""
        return MemoryRows.concatenate(list(self._first(max_examples, max_rows)))

    def view(
        self, max_examples: int | None = None, max_rows: int | None = None, prompts: bool = False, verify: bool = True
    ) -> RowsView:
        """The same rows without copying them into one block: shards stay as they were read.

        Args:
            prompts: with the rows of prompts, so that every example is a complete sequence.
            verify: check the files against the manifest; off if another process of this machine does.

        Raises:
            UserError: the memory has no rows of prompts.
        """
        if prompts and self.manifest.prompt_from is None:
            raise UserError(
                f"{self.folder}: has no rows of prompts, which an adapter that looks back needs. "
                "Build it with build_memory.prompts=true."
            )
        return RowsView(list(self._first(max_examples, max_rows, prompts, verify)))

    def _first(
        self, max_examples: int | None, max_rows: int | None, prompts: bool = False, verify: bool = True
    ) -> Iterator[MemoryRows]:
        examples, rows = 0, 0
        for part in self.shards(verify, prompts):
            if max_examples is not None:
                starts = np.flatnonzero(np.diff(part.example_id, prepend=part.example_id[0] - 1))
                if len(starts) > max_examples - examples:
                    part = part.take(slice(0, int(starts[max_examples - examples])))
                examples += len(starts)
            if max_rows is not None and rows + len(part) > max_rows:
                part = part.take(slice(0, max_rows - rows))
            yield part
            rows += len(part)
            if (max_rows is not None and rows >= max_rows) or (max_examples is not None and examples >= max_examples):
                return


class RowsView:
    """Rows of several shards with the interface of one block.

    Attributes:
        target: `[N]`; weight: `[N]` or None; these are copied, the keys are not.
    """

    def __init__(self, parts: Sequence[MemoryRows]) -> None:
        self._keys = [part.key for part in parts]
        if len({key.dtype for key in self._keys}) > 1:
            raise ValueError("shards of several number formats")
        self._ends = np.cumsum([len(part) for part in parts])
        self.target = np.concatenate([part.target for part in parts])
        self.weight = weights_of(parts)
        self._ids_and_positions = [(part.example_id, part.position) for part in parts]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def example_id(self) -> np.ndarray:
        """`[N]`, a new copy at each access."""
        return np.concatenate([example_id for example_id, _ in self._ids_and_positions])

    @property
    def position(self) -> np.ndarray:
        """`[N]`, a new copy at each access."""
        return np.concatenate([position for _, position in self._ids_and_positions])

    @property
    def key(self) -> RowsView:
        """Indexing decodes: float32 `[n, H]`."""
        return self

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        return self.take(index)[:]

    def take(self, index: np.ndarray | slice) -> Keys:
        """The rows' keys, still encoded."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        shard = np.searchsorted(self._ends, rows, side="right")
        first = self._keys[0]
        data = np.empty((len(rows), first.shape[1]), first.data.dtype)
        scale = None if first.scale is None else np.empty(len(rows), first.scale.dtype)
        for number in np.unique(shard):
            in_shard = shard == number
            part = self._keys[number].take(rows[in_shard] - (self._ends[number] - len(self._keys[number])))
            data[in_shard] = part.data
            if scale is not None and part.scale is not None:
                scale[in_shard] = part.scale
        return Keys(first.dtype, data, scale)
