"""The fine-tuning loop, as each training process runs it. Imports no Ray.

Batches depend on (seed, epoch), dropout on (seed, step, process). A resumed run continues with the interrupted epoch.
The model of the epoch with the best main score is kept, with its version of the memory.

Shapes: B features, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import FinetuneSettings
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.learning.memory_trainer import MemoryAccess, MemoryTrainer
from pema_ray.pluglm.model.knowledge import document_codes
from pema_ray.pluglm.tasks import Feature, FinetuningTask
from pema_ray.pluglm.tasks.reading import TaskExample
from pema_ray.pluglm.tasks.scores import ERRORS
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.history import OnPoint, OnSaved, Point, TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import POINTS, StepInputs

_PREDICTION_BATCH = 64


@dataclass(frozen=True)
class TaskExamples:
    """Examples with their features."""

    examples: Sequence[TaskExample]
    features: Sequence[Feature]
    codes: np.ndarray
    """Document codes of the examples: no example retrieves itself."""

    @classmethod
    def of(cls, task: FinetuningTask, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int) -> TaskExamples:
        codes = document_codes([example.document_id for example in examples])
        return cls(examples, task.features(examples, tokenizer, max_tokens), codes)


class TaskObjective(nn.Module):
    """A model's loss, the mean over a part's labels, for training strategies."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(
        self, input_BT: Tensor, mask_BT: Tensor, type_BT: Tensor, own_B: Tensor, weight: Tensor, *targets: Tensor
    ) -> Any:
        """(loss · weight,); `targets` are in the order of `names`."""
        options = dict(zip(self.names, targets))
        return (self.model(input_BT, mask_BT, type_BT, own_document=own_B, **options).loss * weight,)


def labels_of(targets: Mapping[str, Tensor]) -> int:
    """Number of labels of a loss: tokens with a label, or sequences."""
    first = next(iter(targets.values()))
    return int((first != IGNORED).sum()) if first.ndim > 1 else len(first)


class Finetuner(MemoryTrainer[FinetuneSettings]):
    """Fine-tunes a model on the place's device.

    Args:
        memory: None: no memory.
        write_model: saves the best model so far; the leading process calls it.
    """

    resumed_from = ("model", POINTS, CHECKPOINT)
    validates_first = False
    unused_parameters = True  # the knowledge encoder, with a frozen memory or none

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
        on_point: OnPoint = lambda kind, point: None,
        write_model: Callable[[Any], None] = lambda model: None,
        on_saved: OnSaved = lambda metrics: None,
    ) -> None:
        self.model, self.tokenizer, self.task, self.settings = model, tokenizer, task, settings
        self.train, self.dev, self.memory = train, validation, memory
        self.run_dir, self.seed, self.place = run_dir, seed, place or Place()
        self.on_point, self.write_model, self.on_saved = on_point, write_model, on_saved
        self.version = memory.first if memory else 0
        self.objective = TaskObjective(model, self._names())
        self.frozen, self.name = settings.frozen, run_dir.parent.name
        self.best_version, self.history = self.version, TrainerHistory()
        features = train.features if train else []
        self._per_epoch = math.ceil(len(features) / settings.batch_size)
        if settings.epochs and not features:
            raise UserError("There are no training examples: give data.train, or train.epochs=0.")
        if settings.epochs and not any(labels_of(self._targets([feature])) for feature in features):
            raise UserError(
                "None of the training examples can be learned from: the model can give none of their labels (a cloze "
                "answer must be one token of its vocabulary)."
            )

    @property
    def steps(self) -> int:
        return self._per_epoch * self.settings.epochs

    @property
    def validate_every(self) -> int:
        return max(1, self._per_epoch)

    @property
    def best(self) -> float:
        """The kept model's main score; infinitely bad before the first validation."""
        return self._signed(self.history.best_loss)

    def score(self, point: Point) -> float:
        return self._signed(point[self.task.main])

    def _signed(self, score: float) -> float:
        """Converts between a main score and a criterion to be minimised."""
        return score if self.task.main in ERRORS else -score

    def refreshes_after(self, step: int) -> bool:
        return step % self.settings.refresh_every == 0 or step % self._per_epoch == 0

    def validation(self) -> Point:
        scores = self.task.scores(self.dev.examples, self.predict(self.dev))
        return {"epoch": self.steps_taken // self.validate_every, **scores}

    def keep(self) -> None:
        self.best_version = self.version
        if self.place.leads:
            self.write_model(self.model)

    def best_figures(self) -> Point:
        return {"best_step": self.history.best_step, f"best_{self.task.main}": self.best}

    def versions_needed(self) -> list[int]:
        return [self.version, self.best_version]

    def state(self) -> dict[str, Any]:
        return super().state() | {"best_version": self.best_version}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.best_version = state["best_version"]

    @torch.no_grad()
    def predict(
        self, data: TaskExamples, on_output: Callable[[Any, Sequence[int]], None] = lambda output, examples: None
    ) -> dict[str, Any]:
        """Answers to all examples, by id; every process must call it.

        Args:
            on_output: called with each batch's outputs, retrieved entries included, and the indices of its examples.
        """
        was_training = self.model.training
        self.model.eval()
        features = data.features[self.place.rank :: self.place.world]
        decoded: list[tuple[int, Any]] = []
        for start in range(0, len(features), _PREDICTION_BATCH):
            batch = features[start : start + _PREDICTION_BATCH]
            inputs = self._batch(data, batch, {})
            with self.precision():
                output = self.model(*inputs[:3], own_document=inputs[3], output_retrieved=True)
            examples = [feature.example for feature in batch]
            on_output(output, examples)
            decoded += zip(examples, self.task.decode(output, batch, data.examples))
        self.model.train(was_training)
        if self.place.world > 1:
            parts: list[Any] = [None] * self.place.world
            torch.distributed.all_gather_object(parts, decoded)
            decoded = [pair for part in parts for pair in part]
        return self.task.answers(data.examples, decoded)

    # ── inside ──────────────────────────────────────────────────────────────

    def batches(self, first: int) -> Generator[StepInputs, None, None]:
        c, place, train = self.settings, self.place, self.train
        assert train is not None
        for step in range(first, self.steps):
            epoch, within = divmod(step, self._per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(train.features))
            order = np.resize(order, self._per_epoch * c.batch_size)  # the last step is filled up from the beginning
            numbers = order[within * c.batch_size : (within + 1) * c.batch_size][place.rank :: place.world]
            parts = [[train.features[n] for n in part.tolist()] for part in np.array_split(numbers, c.accumulate)]
            counts = [labels_of(self._targets(features)) for features in parts]
            # The mean per process: gradients are averaged over processes.
            labels = max(1.0, self.sum_number(float(sum(counts))) / place.world)
            inputs = [self._inputs(train, features, count / labels) for features, count in zip(parts, counts)]
            yield StepInputs(inputs, place.world)

    def point(self, sums: Tensor, count: float) -> Point:
        return {"loss": float(sums) / count}

    def _inputs(self, data: TaskExamples, features: Sequence[Feature], weight: float = 1.0) -> tuple[Tensor, ...]:
        """Inputs of the objective."""
        return self._batch(data, features, {"weight": torch.tensor(weight), **self._targets(features)})

    def _targets(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        targets = self.task.collate(features, max(len(feature.token_ids) for feature in features))
        if set(targets) != set(self._names()):
            raise UserError("A training example has no label.")
        return targets

    def _batch(
        self, data: TaskExamples, features: Sequence[Feature], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        B, T = len(features), max(len(feature.token_ids) for feature in features)
        input_BT = np.full((B, T), self.tokenizer.pad_token_id, np.int64)
        mask_BT, type_BT = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
        for b, feature in enumerate(features):
            length = len(feature.token_ids)
            input_BT[b, :length], mask_BT[b, :length], type_BT[b, :length] = feature.token_ids, 1, feature.type_ids
        if getattr(self.model.config.backbone, "type_vocab_size", 2) < 2:  # RoBERTa's
            type_BT[:] = 0
        own_B = data.codes[[feature.example for feature in features]]
        tensors = [torch.from_numpy(array) for array in (input_BT, mask_BT, type_BT, own_B)]
        return tuple(tensor.to(self.place.device) for tensor in (*tensors, *targets.values()))

    def _names(self) -> tuple[str, ...]:
        return ("start_positions", "end_positions") if self.task.kind in ("answers", "factoid") else ("labels",)

    def make_optimizer(self, named: Sequence[tuple[str, nn.Parameter]]) -> Any:
        groups = self.parameter_groups(named)
        return torch.optim.AdamW(groups, lr=self.settings.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    def idle_inputs(self) -> tuple[Tensor, ...]:
        assert self.train is not None
        return self._inputs(self.train, self.train.features[:2])
