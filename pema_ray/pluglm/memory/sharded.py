"""A memory over Ray actors: each holds a part and searches it, the parts' results are merged. The result is that of
one piece, whatever the number of actors.

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
from pema_ray.pluglm.memory.search import RetrievedEntries, merge, nothing
from pema_ray.pluglm.model.knowledge import LocalKnowledge, Tokens, require_entries, require_found
from pema_ray.runtime.hardware import set_threads

_VERSIONS = 2  # that an actor holds: while some readers go on to the next, others still ask for the one before


class _Part(NamedTuple):
    """What an actor says about its part of a version."""

    name: str
    fingerprint: str
    sizes: tuple[int, int]
    entries: int
    first_id: int


class KnowledgeShard:
    """An actor's class: the `part`-th of `parts` equal parts of a memory, of the versions that are asked for.

    What it holds it can read again from disk, so that it may die and be started again at any time.
    """

    def __init__(self, folder: str, part: int, parts: int, threads: int) -> None:
        set_threads(threads)
        self._folder, self._part = folder, (part, parts)
        self._versions: OrderedDict[int, LocalKnowledge] = OrderedDict()

    def describe(self, version: int) -> _Part:
        held = self._knowledge(version)
        first = int(held.entry_N[0]) if len(held) else -1
        return _Part(held.name, held.fingerprint, held.sizes, len(held), first)

    def search(
        self, version: int, query_BQ: np.ndarray, k: int, own_B: np.ndarray | None, cosine: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        held = self._knowledge(version)
        if not len(held):
            return tuple(part.numpy() for part in nothing(len(query_BQ), k))  # pyright: ignore[reportReturnType]
        found = held.table.top(_tensor(query_BQ), k, None if own_B is None else _tensor(own_B), cosine)
        return found.entry_BK.numpy(), found.score_BK.numpy()

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
    """Actors that hold a memory in `shards` parts, spread over the cluster. They live as long as who holds this list.

    Args:
        folder: seen by every node.
        cpus: that each asks of Ray.
    """
    import ray

    options: dict[str, Any] = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": -1}
    actor: Any = ray.remote(**options, scheduling_strategy="SPREAD")(KnowledgeShard)
    where, threads = str(Path(folder).resolve()), max(1, int(cpus))
    return [actor.remote(where, part, shards, threads) for part in range(shards)]


class ShardedKnowledge:
    """A version of a memory that actors hold (`knowledge.Knowledge`).

    Raises:
        UserError: the memory or the version is not there.
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
        found = merge([RetrievedEntries(_tensor(entry), _tensor(score)) for entry, score in parts], k)
        require_found(self.name, found)
        return found

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
        """As `Knowledge.piece_of`: parts are in the order of ids, so a later part's numbers go on from the former's."""
        count_SB = self._pieces(document_B)
        number_SB = number_B.cpu() - (count_SB.cumsum(0) - count_SB)
        document = document_B.cpu().numpy()
        asked = [
            shard.piece_of.remote(self.version, document, number_B.numpy())
            for shard, number_B in zip(self._shards, number_SB)
        ]
        return torch.stack([_tensor(part) for part in _get(asked)]).max(0).values

    def _pieces(self, document_B: Tensor) -> Tensor:
        """Of each part `[S, B]`."""
        return torch.stack([_tensor(part) for part in self._all("pieces_of", document_B.cpu().numpy())])

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return _get([getattr(shard, method).remote(self.version, *arguments) for shard in self._shards])

    def _routed(self, method: str, entry_M: Tensor) -> list[tuple[Tensor, Any]]:
        """Ask each actor about its entries: (their places in `entry_M`, its answer)."""
        owner = np.searchsorted(self._first_ids, entry_M.numpy(), side="right") - 1
        asked = []
        for number in np.unique(owner):
            place = torch.from_numpy(np.flatnonzero(owner == number))
            shard = self._shards[self._filled[max(0, number)]]  # ids before the first are refused there
            asked.append((place, getattr(shard, method).remote(self.version, entry_M[place].numpy())))
        return list(zip([place for place, _ in asked], _get([answer for _, answer in asked])))


def _get(answers: list[Any]) -> list[Any]:
    """Answers of actors; a `UserError` there is one here."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(answers)
    except RayTaskError as error:
        raise (error.cause or error) from None


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # what comes from the object store is read-only
