"""The data owner's distribution while decoding: an adapter, a memory's nearest rows (kNN-LM), or both. Knows no Ray.

    P = λ_t s P_own + (1 - λ_t s) P_LM,    s P_own = (1 - w) g P_PEMA + w P_kNN

with w the neighbours' weight (0 without, 1 without an adapter) and g the λ that an adapter predicts (1 where it does
not). N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pema_ray.data_owner.adapter.knn import NearestNeighbours, require_faiss
from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.data_owner.config import KnnMixConfig
from pema_ray.data_owner.decoding.state import DecodingState
from pema_ray.data_owner.prefixed import TrainedPrefix, is_prefix
from pema_ray.errors import UserError
from pema_ray.line import LMHead, ModelCard
from pema_ray.memory import ExternalMemory

_SMALLEST_SHARE = 1e-30  # keeps the logarithm of a share finite


class Predictor:
    """Predicts the next token from received representations.

    Args:
        weight: w of neighbours beside an adapter; alone, they have weight 1.
        prefix: that its representations stand behind; without adapter and neighbours, P is that of the PLM there.
    """

    prefix: TrainedPrefix | None = None

    def __init__(
        self,
        head: LMHead,
        adapter: PemaAdapter | None = None,
        neighbours: NearestNeighbours | None = None,
        weight: float = 0.0,
        prefix: TrainedPrefix | None = None,
    ) -> None:
        self.head, self.adapter, self.neighbours, self.prefix = head, adapter, neighbours, prefix
        self.weight = 0.0 if neighbours is None else 1.0 if adapter is None else weight

    @property
    def looks_back(self) -> bool:
        """Whether it needs the prompt's representations and one token after another."""
        return self.adapter is not None and self.adapter.config.looks_back

    @property
    def prompt_from(self) -> int:
        """The first position of a prompt whose representation it needs, if it looks back."""
        return 0 if self.adapter is None else self.adapter.config.prompt_from

    @property
    def predicts_lambda(self) -> bool:
        """Whether its share of the mixture differs from row to row."""
        return self.adapter is not None and self.adapter.config.predicts_lambda

    def begin(self, state_TH: torch.Tensor, ids: Sequence[int]) -> DecodingState:
        """The state of one sequence of an adapter that looks back.

        Args:
            state_TH: of its prompt's last T positions.
            ids: all tokens of the prompt.
        """
        assert self.adapter is not None, "neighbours keep no state"
        x_TH = self.adapter.enter(state_TH.to(self.head.weight.device), self.head)
        return DecodingState(self.adapter, self.head, x_TH, ids[len(ids) - len(state_TH) :])

    def both(
        self, state_NH: torch.Tensor, decoding: Sequence[DecodingState | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(log P_own [N, V], s [N], log P_LM [N, V])`, float32: of plain adapters in one product with the LM head.

        Arguments as in `distribution`.
        """
        normed_NH = self.head.norm(state_NH)
        if self.adapter is None or self.neighbours is not None or self.looks_back:
            return *self.distribution(state_NH, decoding), self.head.log_probs(normed_NH)
        own_NH = self.adapter.leave(self.adapter.predict(self.adapter.enter(state_NH, self.head)), self.head)
        rows = torch.cat([own_NH.to(self.head.dtype), normed_NH.to(self.head.dtype)])
        log_own, log_plm = self.head.log_probs(rows).split(len(state_NH))
        return log_own, self.adapter.predicted_lambda(state_NH, self.head), log_plm

    def distribution(
        self, state_NH: torch.Tensor, decoding: Sequence[DecodingState | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(log P_own [N, V], s [N])`, float32.

        Args:
            decoding: the state of each row's sequence, of an adapter that looks back.
        """
        share = torch.ones(len(state_NH), device=state_NH.device)
        log_own: torch.Tensor | None = None
        if self.adapter is not None:
            log_own = self._adapted(self.adapter, state_NH, decoding)
            share = self.adapter.predicted_lambda(state_NH, self.head)
        if self.neighbours is None:
            if log_own is None:  # a prefix alone: the PLM's own distribution
                return self.head.log_probs(self.head.norm(state_NH)), torch.zeros_like(share)
            return log_own, share
        log_knn = self.neighbours.log_probs(state_NH, self.head)
        if log_own is None:
            return log_knn, share
        adapted = (1 - self.weight) * share
        share = adapted + self.weight
        part = (adapted / share).clamp_min(_SMALLEST_SHARE).log()[:, None]
        return torch.logaddexp(log_own + part, log_knn + (self.weight / share).log()[:, None]), share

    def _adapted(
        self, adapter: PemaAdapter, state_NH: torch.Tensor, decoding: Sequence[DecodingState | None]
    ) -> torch.Tensor:
        if not adapter.config.looks_back:
            return adapter.log_probs(state_NH, self.head, alone=True)
        x_NH = adapter.enter(state_NH, self.head)
        states = [state for state in decoding if state is not None]
        attended_NH = torch.cat([state.step(x_NH[row : row + 1]) for row, state in enumerate(states)])
        log_p_NV = self.head.log_probs(adapter.leave(adapter.predict(attended_NH), self.head))
        return torch.cat([state.mix(log_p_NV[row : row + 1]) for row, state in enumerate(states)])

    def log_probs(
        self, state_NH: torch.Tensor, sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """float32 `log(s P_own + (1 - s) P_LM) [N, V]` of stored rows, as a likelihood needs it.

        Args:
            sequences: as `PemaAdapter.log_probs` takes them; log P is then that of the selected rows alone.
        """
        if self.adapter is None:
            if self.neighbours is None:
                return self.head.log_probs(self.head.norm(state_NH))
            return self.neighbours.log_probs(state_NH, self.head)
        log_p = self.adapter.log_probs(state_NH, self.head, sequences)
        if self.neighbours is None:
            return log_p
        rows = state_NH if sequences is None else state_NH[sequences[2]]
        log_knn = self.neighbours.log_probs(rows, self.head)
        return torch.logaddexp(log_p + math.log1p(-self.weight), log_knn + math.log(self.weight))


class PredictorSource(Protocol):
    """Loads a predictor; hashable, so that an actor loads each once."""

    def load(self, card: ModelCard, head: LMHead) -> Predictor: ...


@dataclass(frozen=True)
class PredictorSpec:
    """The folders of a predictor: an adapter's, a memory's, or both.

    Attributes:
        adapter: may hold a key-value prefix too, or a prefix alone.
        knn: how the memory is searched; beside an adapter, weight 0 leaves the memory out.
        max_examples: use only the memory's first examples, up to this number.
    """

    adapter: Path | None = None
    memory: Path | None = None
    knn: KnnMixConfig = field(default_factory=KnnMixConfig)
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if self.adapter is None and self.memory is None:
            raise UserError("A predictor needs an adapter, a memory, or both.")

    def check(self, card: ModelCard) -> None:
        """Raise what `load` would raise, without reading a memory's rows or building an index."""
        _, card = self._behind(card)
        if self.adapter is not None and not is_prefix(self.adapter):
            PemaAdapter.from_pretrained(self.adapter, card)
        if self._has_neighbours:
            require_faiss()
            ExternalMemory.open(str(self.memory), card)

    def load(self, card: ModelCard, head: LMHead) -> Predictor:
        """The predictor, on the LM head's device.

        Raises:
            UserError: there is no such adapter or memory, it belongs to another PLM, or faiss is not installed.
        """
        adapter = neighbours = None
        prefix, card = self._behind(card)
        if self.adapter is not None and not is_prefix(self.adapter):
            adapter = PemaAdapter.from_pretrained(self.adapter, card).to(head.weight.device)
        if self._has_neighbours:
            rows = ExternalMemory.open(str(self.memory), card).view(max_examples=self.max_examples)
            c = self.knn
            neighbours = NearestNeighbours(rows, head, c.neighbours, c.temperature, c.index, c.probes)
        return Predictor(head, adapter, neighbours, self.knn.weight, prefix)

    def _behind(self, card: ModelCard) -> tuple[TrainedPrefix | None, ModelCard]:
        """The adapter's own prefix, and the card of the PLM behind it."""
        prefix = None if self.adapter is None else TrainedPrefix.of_adapter(self.adapter, card)
        return prefix, card if prefix is None else prefix.card(card)

    @property
    def _has_neighbours(self) -> bool:
        return self.memory is not None and (self.adapter is None or self.knn.weight > 0)
