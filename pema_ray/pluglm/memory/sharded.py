"""A memory over Ray actors: each searches its part, and the results are merged. They equal those of one process.

Shapes: B sequences, Q query size, D hidden size, K retrieved entries, M entries of any choice, L tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.search import RetrievedEntries, merge, no_entries
from pema_ray.pluglm.model.knowledge import LocalKnowledge, Tokens, require_entries, require_k
from pema_ray.runtime.hardware import set_threads

_VERSIONS = 2  # loaded by an actor: readers move to the next version one after another


class _Part(NamedTuple):
    """An actor's description of its part of a version."""

    name: str
    fingerprint: str
    sizes: tuple[int, int]
    entries: int
    first_id: int


class KnowledgeShard:
    """Actor that searches the `part`-th of `parts` equal parts of any version. It reloads from disk after a restart."""

    def __init__(self, folder: str, part: int, parts: int, threads: int) -> None:
        set_threads(threads)
        self._folder, self._part = folder, (part, parts)
        self._versions: OrderedDict[int, LocalKnowledge] = OrderedDict()

    def describe(self, version: int) -> _Part:
        part = self._knowledge(version)
        first = int(part.entry_N[0]) if len(part) else -1
        return _Part(part.name, part.fingerprint, part.sizes, len(part), first)

    def search(
        self, version: int, query_BQ: np.ndarray, k: int, own_B: np.ndarray | None, cosine: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        part = self._knowledge(version)
        best = no_entries(len(query_BQ), k)
        if len(part):
            best = part.table.top(_tensor(query_BQ), k, None if own_B is None else _tensor(own_B), cosine)
        return best.entry_BK.numpy(), best.score_BK.numpy()

    def vectors(self, version: int, entry_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key_MQ, value_MD = self._knowledge(version).vectors(_tensor(entry_M))
        return key_MQ.numpy(), value_MD.numpy()

    def tokens(self, version: int, entry_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        token_ML, mask_ML = self._knowledge(version).tokens(_tensor(entry_M))
        return token_ML.numpy(), mask_ML.numpy()

    def pieces_of(self, version: int, document_B: np.ndarray) -> np.ndarray:
        return self._knowledge(version).pieces_of(_tensor(document_B)).numpy()

    def piece_of(self, version: int, document_B: np.ndarray, number_B: np.ndarray) -> np.ndarray:
        return self._knowledge(version).piece_of(_tensor(document_B), _tensor(number_B)).numpy()

    def _knowledge(self, version: int) -> LocalKnowledge:
        if version not in self._versions:
            self._versions[version] = KnowledgeMemory.open(self._folder, version).load(part=self._part)
            while len(self._versions) > _VERSIONS:
                self._versions.popitem(last=False)
        self._versions.move_to_end(version)
        return self._versions[version]


def start_shards(folder: Path | str, shards: int, cpus: float = 1) -> list[Any]:
    """Actors for a memory in `shards` parts, spread over the cluster. They live as long as this list.

    Args:
        folder: visible to every node.
        cpus: CPUs of each actor.
    """
    import ray

    options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(**options, scheduling_strategy="SPREAD")(KnowledgeShard)
    path, threads = str(Path(folder).resolve()), max(1, int(cpus))
    return [actor.remote(path, part, shards, threads) for part in range(shards)]


class ShardedKnowledge:
    """A version of a memory in actors (`knowledge.Knowledge`).

    Raises:
        UserError: there is no such memory or version.
    """

    def __init__(self, shards: Sequence[Any], version: int) -> None:
        self._shards, self.version = list(shards), version
        parts: list[_Part] = self._all("describe")
        self._lengths = [part.entries for part in parts]
        filled = [number for number, part in enumerate(parts) if part.entries]
        self._filled, self._first_ids = filled, np.array([parts[number].first_id for number in filled], np.int64)
        self.name, self.fingerprint, self.sizes = parts[0].name, parts[0].fingerprint, parts[0].sizes

    def __len__(self) -> int:
        return sum(self._lengths)

    def search(self, query_BQ: Tensor, k: int, own_B: Tensor | None = None, cosine: bool = False) -> RetrievedEntries:
        """As `Knowledge.search`."""
        require_entries(self.name, len(self), k)
        own = None if own_B is None else own_B.cpu().numpy()
        parts = self._all("search", query_BQ.detach().float().cpu().numpy(), k, own, cosine)
        best = merge([RetrievedEntries(_tensor(entry), _tensor(score)) for entry, score in parts], k)
        require_k(self.name, best)
        return best

    def vectors(self, entry_M: Tensor) -> tuple[Tensor, Tensor]:
        """As `Knowledge.vectors`."""
        flat = entry_M.cpu().flatten()
        (Q, D), shape = self.sizes, entry_M.shape
        key_MQ, value_MD = torch.empty(len(flat), Q), torch.empty(len(flat), D)
        for place, (key, value) in self._routed("vectors", flat):
            key_MQ[place], value_MD[place] = _tensor(key), _tensor(value)
        return key_MQ.view(*shape, Q), value_MD.view(*shape, D)

    def tokens(self, entry_M: Tensor) -> Tokens:
        """As `Knowledge.tokens`."""
        answers = self._routed("tokens", entry_M.cpu())
        length = max((token.shape[1] for _, (token, _) in answers), default=0)
        token_ML = torch.zeros(len(entry_M), length, dtype=torch.int64)
        mask_ML = torch.zeros_like(token_ML)
        for place, (token, mask) in answers:
            token_ML[place, : token.shape[1]], mask_ML[place, : token.shape[1]] = _tensor(token), _tensor(mask)
        return Tokens(token_ML, mask_ML)

    def pieces_of(self, document_B: Tensor) -> Tensor:
        """As `Knowledge.pieces_of`."""
        return self._pieces(document_B).sum(0)

    def piece_of(self, document_B: Tensor, number_B: Tensor) -> Tensor:
        """As `Knowledge.piece_of`: parts are in the order of ids, so numbering continues from part to part."""
        count_SB = self._pieces(document_B)
        number_SB = number_B.cpu() - (count_SB.cumsum(0) - count_SB)
        document = document_B.cpu().numpy()
        answers = [
            shard.piece_of.remote(self.version, document, number_B.numpy())
            for shard, number_B in zip(self._shards, number_SB)
        ]
        return torch.stack([_tensor(entry_B) for entry_B in _get(answers)]).max(0).values

    def _pieces(self, document_B: Tensor) -> Tensor:
        """`pieces_of` of each part `[S, B]`."""
        return torch.stack([_tensor(part) for part in self._all("pieces_of", document_B.cpu().numpy())])

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return _get([getattr(shard, method).remote(self.version, *arguments) for shard in self._shards])

    def _routed(self, method: str, entry_M: Tensor) -> list[tuple[Tensor, Any]]:
        """Call each actor with its entries: (their places in `entry_M`, its answer)."""
        owner = np.searchsorted(self._first_ids, entry_M.numpy(), side="right") - 1
        places, answers = [], []
        for number in np.unique(owner):
            place = torch.from_numpy(np.flatnonzero(owner == number))
            shard = self._shards[self._filled[max(0, number)]]  # it rejects ids before the first
            places.append(place)
            answers.append(getattr(shard, method).remote(self.version, entry_M[place].numpy()))
        return list(zip(places, _get(answers)))


def _get(answers: list[Any]) -> list[Any]:
    """The actors' answers; raises an actor's `UserError` itself."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(answers)
    except RayTaskError as error:
        raise (error.cause or error) from None


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # arrays of the object store are read-only
