"""What a TRIME experiment takes, counted without running it: parameters, updates, rows, bytes, hours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn

from pema_ray.errors import UserError
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.model.adaptive import AdaptiveEmbedding
from pema_ray.trime.model.decoder import DecoderLM
from pema_ray.trime.model.memory_lm import TrainableLM
from pema_ray.trime.model.registry import count_parameters, make_model
from pema_ray.trime.run import TrimeRun

_STATES = {"nag": 1, "adam": 2, "adamw": 2}  # numbers that the optimiser keeps of every parameter
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate(ABC):
    """Counted exactly, but for `hours`, which is operations over `plan.flops_per_second`."""

    parameters: int
    rows: int
    """Positions to predict: of an epoch, and of the datastore."""
    updates: int
    memory: int
    """Most positions that one position sees while training, m."""
    key_size: int
    training_bytes: int
    """Weights, gradients, optimiser state; activations apart."""
    flops: float
    flops_per_second: float
    """Of all workers."""

    @property
    def hours(self) -> float:
        return self.flops / self.flops_per_second / 3600

    @property
    def datastore_bytes(self) -> int:
        """Keys in float16 and token ids in int32 of the whole training split."""
        return self.rows * (2 * self.key_size + 4)

    @abstractmethod
    def data(self) -> dict[str, str]:
        """The lines of the table about text, updates and memory."""

    def table(self) -> Table:
        table = Table(show_header=False, box=None)
        for name, value in {
            "parameters": f"{self.parameters:,}",
            **self.data(),
            "weights, gradients, optimiser": f"{self.training_bytes / GIB:,.2f} GiB a worker (activations apart)",
            "operations": f"{self.flops:.2e}",
            "hours": f"{self.hours:,.1f} at {self.flops_per_second:.1e} operations/s (plan.flops_per_second × workers)",
        }.items():
            table.add_row(name, value)
        return table


@dataclass(frozen=True, kw_only=True)
class Estimate(TrainingEstimate):
    """Of a language model."""

    vocabulary: int
    tokens_per_update: int

    @property
    def epochs(self) -> float:
        return self.updates * self.tokens_per_update / self.rows

    def data(self) -> dict[str, str]:
        return {
            "vocabulary": f"{self.vocabulary:,}",
            "training tokens": f"{self.rows:,}",
            "updates": f"{self.updates:,} of {self.tokens_per_update:,} tokens, {self.epochs:,.1f} epochs",
            "memory": f"{self.memory:,} tokens",
            "datastore": f"{self.rows:,} rows of {self.key_size} float16, {self.datastore_bytes / GIB:,.1f} GiB",
        }


def estimate(config: TrimeConfig) -> Estimate:
    """Count for an experiment, from its corpus if that has been prepared, else from `plan`.

    Raises:
        UserError: neither is there.
    """
    vocabulary, tokens = _corpus(config)
    b, t = config.batches, config.train
    with torch.device("meta") if not config.model.name.startswith("transformers:") else torch.device("cpu"):
        model = make_model(config.model, vocabulary, b.segment)
    parameters, memory = count_parameters(model), _memory(config)
    per_update = b.segment * b.group * b.groups_per_update
    return Estimate(
        parameters=parameters,
        vocabulary=vocabulary,
        rows=tokens,
        tokens_per_update=per_update,
        updates=t.updates,
        memory=memory,
        key_size=model.hidden_size,
        training_bytes=4 * parameters * (2 + _STATES[t.optimizer]),
        flops=float(per_update * t.updates) * _flops_per_token(model, b.segment, memory),
        flops_per_second=config.plan.flops_per_second * t.workers,
    )


def _corpus(config: TrimeConfig) -> tuple[int, int]:
    run = TrimeRun(config)
    if metrics := run.finished("prepare"):
        return metrics["vocabulary"], metrics["splits"]["train"]["tokens"]
    if config.plan.vocabulary is None or config.plan.tokens is None:
        raise UserError(
            f"{run.folder}: the corpus is not prepared yet. Run: pema-ray trime prepare, or set plan.vocabulary and "
            "plan.tokens."
        )
    return config.plan.vocabulary, config.plan.tokens


def _memory(config: TrimeConfig) -> int:
    b = config.batches
    return {"none": 0, "local": b.segment, "long": b.group * b.segment, "ext": b.group * b.segment}[config.train.memory]


def _flops_per_token(model: TrainableLM, segment: int, memory: int) -> float:
    """Of training: forward and twice as much backward; the two softmaxes compute their logits once more (8, not 6).

    Causal attention and memories compute half of it on average, which is counted in full here.
    """
    attention = 0.0
    if isinstance(model, DecoderLM):
        shape = model.shape
        attention = 12.0 * shape.layers * shape.hidden_size * segment
        first = shape.cutoffs[0] if shape.cutoffs else model.vocabulary_size
        head = min(first, model.vocabulary_size) * shape.hidden_size
    else:
        head = model.vocabulary_size * model.hidden_size
    return 6.0 * inner_parameters(model) + attention + 8.0 * (head + memory * model.hidden_size)


def inner_parameters(model: nn.Module) -> int:
    """Parameters outside embeddings."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding | AdaptiveEmbedding) for p in m.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
