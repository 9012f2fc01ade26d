"""The pre-training loop, in one process of any number. Imports no Ray: the memory is encoded anew by whoever can.

Batches follow from (seed, epoch), masks from (seed, epoch, sequence), dropout from (seed, step, process): a run that
resumes goes on as if it had never stopped, on the version of the memory that it had.

Shapes: B sequences, T positions, L tokens of a document.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings
from pema_ray.pluglm.learning.masking import MaskedBatch, Masker, collate
from pema_ray.pluglm.learning.objective import PretrainObjective
from pema_ray.pluglm.learning.text import Sequences
from pema_ray.pluglm.learning.trainer import MemoryAccess, MemoryTrainer, Tell
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.strategies import Place, Strategy, make_strategy

if TYPE_CHECKING:
    from pema_ray.training.ray_checkpoint import Saved

logger = logging.getLogger(__name__)


class PretrainLoop(MemoryTrainer[PretrainSettings]):
    """Trains a model that lies on the place's device; `run` leaves a checkpoint and a memory that belongs to it."""

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
        tell: Tell = lambda kind, point: None,
        name: str = "pluglm",
        on_saved: Saved = lambda metrics: None,
    ) -> None:
        if len(train) < settings.batch_size:
            raise UserError(f"train.batch_size={settings.batch_size}: there are only {len(train)} training sequences.")
        self.model, self.tokenizer, self.settings, self.name = model, tokenizer, settings, name
        self.train, self.validation, self.memory = train, validation, memory
        self.run_dir, self.seed, self.place, self.tell, self.on_saved = run_dir, seed, place or Place(), tell, on_saved
        self.version = memory.first
        self.history: list[dict[str, Any]] = []
        self._masker = Masker.of(tokenizer, settings.mask_share, seed, settings.masking == "dynamic")
        self._objective = PretrainObjective(model, settings.contrastive_temperature)
        self.frozen = False

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / CHECKPOINT

    def run(self) -> int:
        """Train to the end; returns the version of the memory that belongs to the trained model."""
        step = self._restore() if self.checkpoint.exists() else self._begin()
        finished = step >= self.settings.steps
        while step < self.settings.steps:
            started = time.perf_counter()
            point = self._step(step)
            step += 1
            last = step == self.settings.steps
            point["seconds"] = round(time.perf_counter() - started, 4)
            if self.place.leads:
                self.tell("train", {"step": step, **point})
            if last or step % self.settings.refresh_every == 0:
                self.refresh()
            if self.validation is not None and (last or step % self.settings.validate_every == 0):
                self._validate(step)
            if last or step % self.settings.checkpoint_every == 0:
                self._save(step)
        if finished:
            logger.info("training had finished before, at step %d", step)
        return self.version

    # ── a step ──────────────────────────────────────────────────────────────

    def _step(self, step: int) -> dict[str, Any]:
        place = self.place
        parts = list(self._parts(step))
        predicted = self.sum(float(sum(part.predicted for part, _ in parts)))
        warming = step < self.settings.contrastive_steps
        self.draw(step)
        self._objective.train()
        totals = np.zeros(3)
        for number, (part, place_B) in enumerate(parts):
            with self.precision():
                inputs = self._inputs(part, predicted, place_B if warming else None)
                found = self.strategy.learn(inputs, last=number == len(parts) - 1)
            entropy, contrastive, recall = (float(value) for value in found[1:])
            totals += [entropy / max(1.0, predicted), contrastive / len(parts), recall / len(parts)]
        loss = self.sum(totals[0])
        contrastive, recall = (self.sum(one) / place.world for one in totals[1:])
        rate = self.update(step, loss)
        point = {"loss": loss, "learning_rate": rate, "memory_version": self.version}
        return point | ({"contrastive": contrastive, "recall": recall} if warming else {})

    def make_strategy(self) -> Strategy:
        c, model = self.settings, self.model.config
        return make_strategy(
            c.strategy, self.place, self._objective, self._optimizer, batch_size=c.batch_size, accumulate=c.accumulate,
            clip=c.clip, zero_stage=c.zero_stage, idle_inputs=self._idle_inputs,
            unused_parameters=model.fix_keys or model.fix_values,
        )  # fmt: skip

    def _parts(self, step: int) -> Iterator[tuple[MaskedBatch, Tensor]]:
        """This process's sequences of a step, in `accumulate` parts, and how far into its document each lies."""
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
        """What the objective takes. DDP averages gradients over processes, so that theirs must add up to the step's.

        Args:
            place_B: how far into its document each sequence lies; none: retrieval is not being warmed up.
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
        """Tokens of the entries that sequences were cut from, or lie nearest to: of its document's entries the one at
        the same share of the document. All masked where the memory has none."""
        knowledge = self.model.knowledge
        assert knowledge is not None
        entry_B = knowledge.piece_of(document_B, (place_B * knowledge.pieces_of(document_B)).long())
        has_B = entry_B >= 0
        if not bool(has_B.any()):
            return torch.zeros(len(entry_B), 1, dtype=torch.int64), torch.zeros(len(entry_B), 1, dtype=torch.int64)
        token_PL, mask_PL = knowledge.tokens(entry_B[has_B])
        token_BL = torch.zeros(len(entry_B), token_PL.shape[1], dtype=torch.int64)
        mask_BL = torch.zeros_like(token_BL)
        token_BL[has_B], mask_BL[has_B] = token_PL, mask_PL
        return token_BL, mask_BL

    def _idle_inputs(self) -> tuple[Any, ...]:
        return self._inputs(next(self._parts(0))[0], 1.0)

    def _optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Any:
        c, groups = self.settings, self.parameter_groups(named)
        if c.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(0.9, 0.999), eps=1e-6)
        from pytorch_optimizer import Lamb

        return Lamb(groups, lr=c.learning_rate, betas=(0.9, 0.999), eps=1e-6)

    # ── validation ──────────────────────────────────────────────────────────

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Mean cross entropy of masked tokens, with the masks of epoch 0."""
        assert self.validation is not None
        self._objective.eval()
        count = min(len(self.validation), self.settings.validation_sequences)
        mine = list(range(self.place.rank, count, self.place.world))
        size = max(1, self.settings.batch_size // self.settings.accumulate // self.place.world)
        entropy = predicted = 0.0
        for start in range(0, len(mine), size):
            part = self._batch(self.validation, mine[start : start + size], 0)
            with self.precision():
                found = self._objective(*self._inputs(part, 1.0))
            entropy, predicted = entropy + float(found[1]), predicted + part.predicted
        entropy, predicted = self.sum(entropy), self.sum(predicted)
        point = {"step": step, "loss": entropy / max(1.0, predicted), "memory_version": self.version}
        self.history.append(point)
        if self.place.leads:
            self.tell("validation", point)

    # ── resume ──────────────────────────────────────────────────────────────

    def _begin(self) -> int:
        self.attach(self.version)
        self.strategy = self.make_strategy()
        if self.validation is not None:
            self._validate(0)
        return 0

    def _save(self, step: int) -> None:
        self.save(self.checkpoint, {"step": step, "history": self.history})
        validated = {"validation_loss": self.history[-1]["loss"]} if self.history else {}
        self.on_saved({"step": step, "memory_version": self.version, **validated})
        if self.place.leads and self.memory is not None:
            self.memory.prune([self.version])

    def _restore(self) -> int:
        described = self.restore(self.checkpoint)
        self.history = described["history"]
        logger.info("training resumes at step %d with memory version %d", described["step"], self.version)
        return described["step"]
