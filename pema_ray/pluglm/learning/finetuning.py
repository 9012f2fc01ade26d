"""The fine-tuning loop, in one process of any number. Imports no Ray.

Batches follow from (seed, epoch), dropout from (seed, step, process); a run that resumes goes on at the epoch it was
in. The model of the epoch with the best main score is kept, with the version of the memory that belongs to it.

Shapes: B features, T positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import FinetuneSettings
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.learning.trainer import MemoryAccess, MemoryTrainer, Tell
from pema_ray.pluglm.model.knowledge import document_codes
from pema_ray.pluglm.tasks import Feature, FinetuningTask
from pema_ray.pluglm.tasks.reading import TaskExample
from pema_ray.pluglm.tasks.scores import ERRORS
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.strategies import Place, Strategy, make_strategy

if TYPE_CHECKING:
    from pema_ray.training.ray_checkpoint import Saved

logger = logging.getLogger(__name__)
_PREDICTED = 64  # features scored together


@dataclass(frozen=True)
class TaskExamples:
    """Examples with their features."""

    examples: Sequence[TaskExample]
    features: Sequence[Feature]
    codes: np.ndarray
    """Document codes of the examples, so that they do not retrieve themselves."""

    @classmethod
    def of(cls, task: FinetuningTask, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> TaskExamples:
        codes = document_codes([example.document_id for example in examples])
        return cls(examples, task.features(examples, tokenizer, max_tokens), codes)


class TaskObjective(nn.Module):
    """A model's loss, the mean over a part's labels, as training strategies take it."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(
        self, input_BT: Tensor, mask_BT: Tensor, type_BT: Tensor, own_B: Tensor, weight: Tensor, *targets: Tensor
    ) -> Any:
        """(loss · weight,); `targets` go by `names`."""
        options = dict(zip(self.names, targets))
        return (self.model(input_BT, mask_BT, type_BT, own_document=own_B, **options).loss * weight,)


def labels_of(targets: Mapping[str, Tensor]) -> int:
    """What a loss is the mean over: tokens that have a label, or sequences."""
    first = next(iter(targets.values()))
    return int((first != IGNORED).sum()) if first.ndim > 1 else len(first)


class Finetuner(MemoryTrainer[FinetuneSettings]):
    """Fine-tunes a model that lies on the place's device.

    Args:
        memory: none: the model goes without.
        keep: writes the model away; the leading process asks when an epoch was the best so far.
        on_saved: called by every process with an epoch's scores, once its checkpoint is saved.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: FinetuningTask,
        settings: FinetuneSettings,
        train: TaskExamples | None,
        validation: TaskExamples,
        memory: MemoryAccess | None,
        run_dir: Path,
        seed: int = 0,
        place: Place | None = None,
        tell: Tell = lambda kind, point: None,
        keep: Callable[[Any], None] = lambda model: None,
        on_saved: Saved = lambda metrics: None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.settings = model, tokenizer, task, settings
        self.train, self.validation, self.memory = train, validation, memory
        self.run_dir, self.seed, self.place, self.tell, self.keep = run_dir, seed, place or Place(), tell, keep
        self.on_saved = on_saved
        self.version = memory.first if memory else 0
        self.frozen, self.name = settings.frozen, run_dir.parent.name
        self.best_version, self.history = self.version, []
        features = train.features if train else []
        self._per_epoch = math.ceil(len(features) / settings.batch_size)
        if settings.epochs and not features:
            raise UserError("There are no training examples: give data.train, or train.epochs=0.")
        if settings.epochs and not any(labels_of(self._targets([one])) for one in features):
            raise UserError(
                "None of the training examples can be learned from: no label is one of those that the model can give "
                "(of cloze: an answer that is one token of its vocabulary)."
            )

    @property
    def steps(self) -> int:
        return self._per_epoch * self.settings.epochs

    @property
    def best(self) -> float:
        """The kept model's main score; the worst there is before there is one."""
        found = [point[self.task.main] for point in self.history]
        return min(found, default=math.inf) if self._is_error else max(found, default=-math.inf)

    @property
    def _is_error(self) -> bool:
        """Whether less of the main score is better."""
        return self.task.main in ERRORS

    def run(self) -> None:
        """Train to the end."""
        checkpoint = self.run_dir / CHECKPOINT
        if not self.steps:
            self.attach(self.version)
            self._end_epoch(0)
            return
        if checkpoint.exists():
            epoch = self._restore(checkpoint)
        else:
            self.attach(self.version)
            self.strategy, epoch = self.make_strategy(), 0
        while epoch < self.settings.epochs:
            for step in range(epoch * self._per_epoch, (epoch + 1) * self._per_epoch):
                self._step(step)
                if (step + 1) % self.settings.refresh_every == 0:
                    self.refresh()
            if (epoch + 1) * self._per_epoch % self.settings.refresh_every:
                self.refresh()
            epoch += 1
            self._end_epoch(epoch)
            self.save(checkpoint, {"epoch": epoch, "best_version": self.best_version, "history": self.history})
            self.on_saved(self.history[-1])
            if self.place.leads and self.memory is not None:  # only now: a run that dies before needs an older version
                self.memory.prune([self.version, self.best_version])

    @torch.no_grad()
    def predict(
        self, data: TaskExamples, on_output: Callable[[Any, Sequence[int]], None] = lambda output, examples: None
    ) -> dict[str, Any]:
        """Answers to all examples, by id; every process must ask.

        Args:
            on_output: is given the model's outputs, with what it retrieved, and the examples they are of, by place.
        """
        was_training = self.model.training
        self.model.eval()
        mine = range(self.place.rank, len(data.features), self.place.world)
        said: list[tuple[int, Any]] = []
        for start in range(0, len(mine), _PREDICTED):
            part = [data.features[number] for number in mine[start : start + _PREDICTED]]
            inputs = self._batch(data, part, {})
            with self.precision():
                output = self.model(*inputs[:3], own_document=inputs[3], output_retrieved=True)
            examples = [one.example for one in part]
            on_output(output, examples)
            said += zip(examples, self.task.decode(output, part, data.examples))
        self.model.train(was_training)
        if self.place.world > 1:
            parts: list[Any] = [None] * self.place.world
            torch.distributed.all_gather_object(parts, said)
            said = [one for part in parts for one in part]
        return self.task.answers(data.examples, said)

    # ── inside ──────────────────────────────────────────────────────────────

    def _step(self, step: int) -> None:
        c, place, train = self.settings, self.place, self.train
        assert train is not None
        epoch, within = divmod(step, self._per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(train.features))
        order = np.resize(order, self._per_epoch * c.batch_size)  # the last step's rest comes from the beginning
        numbers = order[within * c.batch_size : (within + 1) * c.batch_size][place.rank :: place.world]
        self.draw(step)
        self.model.train()
        parts = [[train.features[one] for one in part.tolist()] for part in np.array_split(numbers, c.accumulate)]
        counts = [labels_of(self._targets(features)) for features in parts]
        labels = max(
            1.0, self.sum(float(sum(counts))) / place.world
        )  # a process's; gradients are averaged over processes
        total = 0.0
        for number, (features, count) in enumerate(zip(parts, counts)):
            with self.precision():
                inputs = self._learned(train, features, count / labels)
                found = self.strategy.learn(inputs, last=number == c.accumulate - 1)
            total += found[0].item()
        loss = self.sum(total) / place.world
        rate = self.update(step, loss)
        if place.leads:
            self.tell("train", {"step": step + 1, "loss": loss, "learning_rate": rate})

    def _learned(self, data: TaskExamples, features: Sequence[Feature], weight: float = 1.0) -> tuple[Tensor, ...]:
        """Inputs of the objective."""
        targets = self._targets(features)
        weighed = {"weight": torch.tensor(weight), **targets}
        return self._batch(data, features, weighed)

    def _targets(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        targets = self.task.collate(features, max(len(one.token_ids) for one in features))
        if set(targets) != set(self._names()):
            raise UserError("A training example has no label.")
        return targets

    def _batch(
        self, data: TaskExamples, features: Sequence[Feature], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        B, T = len(features), max(len(one.token_ids) for one in features)
        input_BT = np.full((B, T), self.tokenizer.pad_token_id, np.int64)
        mask_BT, type_BT = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
        for row, one in enumerate(features):
            length = len(one.token_ids)
            input_BT[row, :length], mask_BT[row, :length], type_BT[row, :length] = one.token_ids, 1, one.type_ids
        if getattr(self.model.config.backbone, "type_vocab_size", 2) < 2:  # RoBERTa's
            type_BT[:] = 0
        own_B = torch.from_numpy(data.codes[[one.example for one in features]])
        tensors = [torch.from_numpy(array) for array in (input_BT, mask_BT, type_BT)]
        return tuple(one.to(self.place.device) for one in (*tensors, own_B, *targets.values()))

    def _names(self) -> tuple[str, ...]:
        return ("start_positions", "end_positions") if self.task.kind in ("answers", "factoid") else ("labels",)

    def make_strategy(self) -> Strategy:
        c, train = self.settings, self.train
        assert train is not None
        objective = TaskObjective(self.model, self._names())
        return make_strategy(
            c.strategy, self.place, objective, self._optimizer, batch_size=c.batch_size, accumulate=c.accumulate,
            clip=c.clip, zero_stage=c.zero_stage, idle_inputs=lambda: self._learned(train, train.features[:2]),
            unused_parameters=True,  # the knowledge encoder of a frozen memory, or of none
        )  # fmt: skip

    def _optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Any:
        groups = self.parameter_groups(named)
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    def _end_epoch(self, epoch: int) -> None:
        scores = self.task.scores(self.validation.examples, self.predict(self.validation))
        point = {"step": epoch * self._per_epoch, "epoch": epoch, **scores}
        main = scores[self.task.main]
        better = main < self.best if self._is_error else main > self.best
        self.history.append(point)
        if better:
            self.best_version = self.version
        if self.place.leads:
            self.tell("validation", point)
            if better:
                self.keep(self.model)

    def _restore(self, path: Path) -> int:
        described = self.restore(path)
        self.history, self.best_version = described["history"], described["best_version"]
        logger.info("fine-tuning resumes after epoch %d", described["epoch"])
        return described["epoch"]
