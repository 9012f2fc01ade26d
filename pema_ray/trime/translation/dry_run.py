"""What a translation experiment takes, counted without running it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pema_ray.errors import UserError
from pema_ray.trime.dry_run import GIB, TrainingEstimate, inner_parameters
from pema_ray.trime.model.registry import count_parameters
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.model import Translator, make_translator
from pema_ray.trime.translation.run import MtRun


@dataclass(frozen=True, kw_only=True)
class MtEstimate(TrainingEstimate):
    """Rows are target positions with `<eos>`; `updates` is the minimum, of groups without padding."""

    pairs: int

    def data(self) -> dict[str, str]:
        return {
            "training pairs": f"{self.pairs:,} pairs, {self.rows:,} target positions",
            "updates": f"at least {self.updates:,}",
            "memory": f"{self.memory:,} positions",
            "datastore": f"{self.rows:,} rows of {self.key_size} float16, {self.datastore_bytes / GIB:,.2f} GiB",
        }


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
    if metrics := run.finished("prepare"):
        train, words = metrics["train"], (metrics["source_words"], metrics["target_words"])
        return train["pairs"], train["target_tokens"] + train["pairs"], words
    if config.plan.pairs is None or config.plan.target_tokens is None:
        raise UserError(
            f"{run.folder}: the text is not prepared yet. Run: pema-ray trime mt-train, or set plan.pairs and "
            "plan.target_tokens."
        )
    words = (config.data.source_subwords, config.data.target_subwords)
    return config.plan.pairs, config.plan.target_tokens + config.plan.pairs, words


def _flops_per_row(model: Translator, memory: int) -> float:
    """Of training: forward and twice as much backward, of a source as long as its target; attention is left out.

    The backward pass computes the memory's logits once more (8, not 6).
    """
    return (
        6.0 * (inner_parameters(model) + model.vocabulary_size * model.hidden_size) + 8.0 * memory * model.hidden_size
    )
