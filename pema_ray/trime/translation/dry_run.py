"""What a translation experiment takes, counted before any machine is rented."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from pema_ray.errors import UserError
from pema_ray.trime.model.registry import count_parameters
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.model import Translator, make_translator
from pema_ray.trime.translation.run import MtRun

_GIB = 2**30


@dataclass(frozen=True)
class MtEstimate:
    """Rows are counted; `updates` is the least there can be, for groups that padding does not thin out."""

    parameters: int
    pairs: int
    rows: int
    """Target positions, `<eos>` among them: of training, and of the datastore."""
    updates: int
    memory: int
    """Most positions that a position may look at while training."""
    key_size: int
    training_bytes: int
    """Weights, gradients, AdamW's two states; activations apart."""
    flops: float
    flops_per_second: float
    """Of all workers."""

    @property
    def hours(self) -> float:
        return self.flops / self.flops_per_second / 3600

    @property
    def datastore_bytes(self) -> int:
        """Keys in float16 and token ids in int32."""
        return self.rows * (2 * self.key_size + 4)

    def table(self) -> Table:
        table = Table(show_header=False, box=None)
        for name, value in {
            "parameters": f"{self.parameters:,}",
            "training pairs": f"{self.pairs:,} pairs, {self.rows:,} target positions",
            "updates": f"at least {self.updates:,}",
            "memory": f"{self.memory:,} positions",
            "datastore": f"{self.rows:,} rows of {self.key_size} float16, {self.datastore_bytes / _GIB:,.2f} GiB",
            "weights, gradients, optimiser": f"{self.training_bytes / _GIB:,.2f} GiB a worker (activations apart)",
            "operations": f"{self.flops:.2e}",
            "hours": f"{self.hours:,.1f} at {self.flops_per_second:.1e} operations/s (plan.flops_per_second × workers)",
        }.items():
            table.add_row(name, value)
        return table


def estimate(config: MtConfig) -> MtEstimate:
    """Count for an experiment, from its text if that has been prepared, else from `plan`.

    Raises:
        UserError: neither is there.
    """
    c, t = config, config.train
    pairs, rows, words = _corpus(c)
    model = make_translator(c.model, *words, c.data.max_tokens)
    parameters, memory = count_parameters(model), c.batches.max_tokens if t.memory == "trime" else 0
    groups = math.ceil(rows / c.batches.max_tokens)
    return MtEstimate(
        parameters=parameters,
        pairs=pairs,
        rows=rows,
        updates=max(1, math.ceil(t.epochs * groups / c.batches.groups_per_update)),
        memory=memory,
        key_size=model.hidden_size,
        training_bytes=4 * parameters * 4,
        flops=t.epochs * rows * _flops_per_row(model, memory),
        flops_per_second=c.plan.flops_per_second * t.workers,
    )


def _corpus(config: MtConfig) -> tuple[int, int, tuple[int, int]]:
    """Training pairs, target positions, and words of the source's and the target's vocabulary."""
    run = MtRun(config)
    if found := run.finished("prepare"):
        train = found["train"]
        return train["pairs"], train["target_tokens"] + train["pairs"], (found["source_words"], found["target_words"])
    if config.plan.pairs is None or config.plan.target_tokens is None:
        raise UserError(
            f"{run.folder}: the text is not prepared yet. Run: pema-ray trime mt-train, or set plan.pairs and "
            "plan.target_tokens."
        )
    words = (config.data.source_subwords, config.data.target_subwords)
    return config.plan.pairs, config.plan.target_tokens + config.plan.pairs, words


def _flops_per_row(model: Translator, memory: int) -> float:
    """Of training: forward and twice as much backward, of a source as long as its target; attention is left out.

    The memory's logits are computed once more on the way back (8, not 6).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    inner = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return 6.0 * (inner + model.vocabulary_size * model.hidden_size) + 8.0 * memory * model.hidden_size
