"""The pre-training loop, as each training process runs it. Imports no Ray.

Batches depend on (seed, epoch), masks on (seed, epoch, sequence), dropout on (seed, step, process). So a resumed run,
with its version of the memory, equals an undisturbed one.

Shapes: B sequences, T positions, L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings
from pema_ray.pluglm.learning.masking import MaskedBatch, Masker, collate
from pema_ray.pluglm.learning.memory_trainer import MemoryAccess, MemoryTrainer
from pema_ray.pluglm.learning.objective import PretrainObjective
from pema_ray.pluglm.learning.text import Sequences
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import StepInputs

_VALIDATION_SEQUENCES = 1024


class Pretrainer(MemoryTrainer[PretrainSettings]):
    """Trains a model on the place's device; it leaves a checkpoint and the memory of that model."""

    def __init__(
        self,
        model: PlugLMForMaskedLM,
        tokenizer: Any,
        settings: PretrainSettings,
        train: Sequences,
        validation: Sequences | None,
        memory: MemoryAccess,
        run_dir: Path,
        seed: int = 0,
        place: Place | None = None,
        on_point: OnPoint = lambda kind, point: None,
        name: str = "pluglm",
        on_saved: OnSaved = lambda metrics: None,
    ) -> None:
        if len(train) < settings.batch_size:
            raise UserError(f"train.batch_size={settings.batch_size}: there are only {len(train)} training sequences.")
        self.model, self.tokenizer, self.settings, self.name = model, tokenizer, settings, name
        self.train, self.dev, self.memory = train, validation, memory
        self.run_dir, self.seed, self.place = run_dir, seed, place or Place()
        self.on_point, self.on_saved, self.history = on_point, on_saved, TrainerHistory()
        self.version = memory.first
        self.objective = PretrainObjective(model, settings.contrastive_temperature)
        self.frozen = False
        self.unused_parameters = model.config.fix_keys or model.config.fix_values
        self._masker = Masker.of(tokenizer, settings.mask_share, seed, settings.masking == "dynamic")

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def validate_every(self) -> int:
        return self.settings.validate_every

    @property
    def checkpoint_every(self) -> int:
        return self.settings.checkpoint_every

    def refreshes_after(self, step: int) -> bool:
        return step == self.steps or step % self.settings.refresh_every == 0

    def keep(self) -> None:
        """Nothing: the memory belongs to the model after the last step."""

    def best_figures(self) -> Point:
        return {}

    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Any:
        c, groups = self.settings, self.parameter_groups(named)
        if c.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(0.9, 0.999), eps=1e-6)
        from pytorch_optimizer import Lamb

        return Lamb(groups, lr=c.learning_rate, betas=(0.9, 0.999), eps=1e-6)

    def idle_inputs(self) -> tuple[Any, ...]:
        return self._inputs(next(self._parts(0))[0], 1.0)

    # ── a step ──────────────────────────────────────────────────────────────

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        for step in range(first, self.steps):
            parts = list(self._parts(step))
            predicted = self.sum_number(float(sum(part.predicted for part, _ in parts)))
            warming = step < self.settings.contrastive_steps
            inputs = [self._inputs(part, predicted, place_B if warming else None) for part, place_B in parts]
            yield StepInputs(inputs, max(1.0, predicted))

    def point(self, sums: Tensor, count: float) -> Point:
        _, entropy, contrastive, recall = sums.tolist()
        point = {"loss": entropy / count, "memory_version": self.version}
        if self.steps_taken < self.settings.contrastive_steps:
            parts = self.settings.accumulate * self.place.world
            point |= {"contrastive": contrastive / parts, "recall": recall / parts}
        return point

    def _parts(self, step: int) -> Iterator[tuple[MaskedBatch, Tensor]]:
        """This process's sequences of a step, in `accumulate` parts, with their relative positions in documents."""
        c, place = self.settings, self.place
        per_epoch = len(self.train) // c.batch_size
        epoch, within = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.train))
        numbers = order[within * c.batch_size : (within + 1) * c.batch_size][place.rank :: place.world]
        for part in np.array_split(numbers, c.accumulate):
            place_B = torch.tensor([self.train.place(number) for number in part.tolist()])
            yield self._batch(self.train, part.tolist(), epoch), place_B

    def _batch(self, sequences: Sequences, numbers: Sequence[int], epoch: int) -> MaskedBatch:
        rows, documents = [], []
        for number in numbers:
            token_ids, document = sequences[number]
            rows.append(self._masker.mask(token_ids, number, epoch))
            documents.append(document)
        return collate(rows, documents, self.tokenizer.pad_token_id)

    def _inputs(self, part: MaskedBatch, predicted: float, place_B: Tensor | None = None) -> tuple[Any, ...]:
        """The objective's arguments. DDP averages gradients over processes, so weights are multiplied by their number.

        Args:
            place_B: relative positions of the sequences in their documents; None: no contrastive warm-up.
        """
        device, world = self.place.device, self.place.world
        weight = torch.tensor(world / max(1.0, predicted), device=device)
        own: tuple[Any, ...] = (None, None, None)
        if place_B is not None:
            token_BL, mask_BL = self._own_pieces(part.document_B, place_B)
            share = self.settings.contrastive_weight / self.settings.accumulate
            own = (token_BL.to(device), mask_BL.to(device), torch.tensor(share, device=device))
        return (*(tensor.to(device) for tensor in part), weight, *own)

    def _own_pieces(self, document_B: Tensor, place_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of each sequence's own entry: its document's entry at the same relative position. All masked if the
        memory has none.
        """
        knowledge = self.model.knowledge
        assert knowledge is not None
        entry_B = knowledge.piece_of(document_B, (place_B * knowledge.pieces_of(document_B)).long())
        has_B = entry_B >= 0
        token_PL, mask_PL = knowledge.tokens(entry_B[has_B])
        token_BL = torch.zeros(len(entry_B), token_PL.shape[1], dtype=torch.int64)
        mask_BL = torch.zeros_like(token_BL)
        token_BL[has_B], mask_BL[has_B] = token_PL, mask_PL
        return token_BL, mask_BL

    # ── validation ──────────────────────────────────────────────────────────

    def validation(self) -> Point | None:
        """Mean cross entropy of masked tokens, with the masks of epoch 0."""
        if self.dev is None:
            return None
        count = min(len(self.dev), _VALIDATION_SEQUENCES)
        numbers = range(self.place.rank, count, self.place.world)
        size = max(1, self.settings.batch_size // self.settings.accumulate // self.place.world)
        sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)  # cross entropy, tokens predicted
        for start in range(0, len(numbers), size):
            part = self._batch(self.dev, numbers[start : start + size], 0)
            with self.precision():
                entropy = self.objective(*self._inputs(part, 1.0))[1]
            sums += torch.stack([entropy.double(), entropy.new_tensor(part.predicted)])
        entropy, predicted = self.place.all_reduce(sums).tolist()
        return {"loss": entropy / max(1.0, predicted), "memory_version": self.version}
