"""The systems of a comparison that are trained: their names, their settings, and what they need.

A variant is an adapter of another training than the run's own; `LORA`, `PREFIXES` and `SMALL_LMS` are the other
trained peers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pema_ray.data_owner.adapter.knn import require_faiss
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.config import ExperimentConfig
from pema_ray.runtime.settings import validate as validate_section

_LOCAL_MEMORY_WIDTH = 256
_PUBLISHED: dict[str, Any] = {
    "residual": False, "space": "pre_norm", "solver": "adam", "scale_by_rank": True, "fresh_maps": True,
    "kappa": 0.2, "dropout": 0.2, "learning_rate": 1e-3, "final_learning_rate": None, "warm_up_steps": 0,
    "batch_size": 2048, "reconstruction_batch_size": 20480, "reconstruction_epochs": 200, "epochs": 200,
    "validate_every": 100, "patience": 2,
}  # fmt: skip
_PUBLISHED_RANK = 512


@dataclass(frozen=True, slots=True)
class Variant:
    """An adapter of another training than the run's.

    Attributes:
        label: what tells it apart from the run's own.
        changes: of the training's settings.
        shots: whether its prompts show `compare.few_shot` examples.
    """

    label: str
    changes: Callable[[TrainConfig], dict[str, Any]] = lambda config: {}
    shots: bool = False


VARIANTS: dict[str, Variant] = {
    "pema": Variant("PEMA"),
    "pema_shots": Variant("PEMA on prompts with examples", shots=True),
    "pema_published": Variant("PEMA as published", lambda c: {**_PUBLISHED, "rank": max(c.rank, _PUBLISHED_RANK)}),
    "pema_kappa_0": Variant("PEMA, κ = 0", lambda c: {"kappa": 0.0}),
    "pema_no_stage_1": Variant("PEMA without stage 1", lambda c: {"solver": "none"}),
    "pema_adam": Variant("PEMA, stage 1 by Adam", lambda c: {"solver": "adam"}),
    "pema_predicted_lambda": Variant("PEMA, λ predicted", lambda c: {"predict_lambda": True}),
    "pema_look_back": Variant("PEMA that looks back", lambda c: {"look_back": c.look_back or 1}),
    "pema_local_memory": Variant(
        "PEMA with a local memory", lambda c: {"local_memory": c.local_memory or _LOCAL_MEMORY_WIDTH}
    ),
}
LORA = {"lora": False, "lora_shots": True}  # whether its prompts show examples
PREFIXES = {"prefix": "plm", "pema_prefix": "pema"}  # which system stands behind a trained prefix
SMALL_LMS = {"memory_decoder": "Memory Decoder", "proxy_tuning": "proxy-tuning"}


def check(config: ExperimentConfig, name: str) -> None:
    """Refuse a system whose settings do not go with the run's.

    Raises:
        UserError: as it would when the system is trained.
    """
    if name in VARIANTS:
        training_of(config.train, name)
    if name in ("knn", "memory_decoder"):
        require_faiss()
    if name in LORA:
        _check_lora(config.plm, name)
    build = config.build_memory
    if name in SMALL_LMS and (build.context != "teacher_forced" or build.deduplicate):
        raise UserError(
            f"compare.systems: {name} needs a row for every token: build_memory.context=teacher_forced and "
            "build_memory.deduplicate=false."
        )


def _check_lora(plm: PLMConfig, name: str) -> None:
    if not plm.is_own:
        raise UserError(
            f"compare.systems: {name} trains the PLM's weights, which {plm.label} does not hand out. "
            "Leave it out, or set plm.name."
        )
    if plm.quantization:
        raise UserError(f"compare.systems: {name} trains the PLM's weights, which plm.quantization does not allow.")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"compare.systems: {name} needs peft: pip install peft.")


def training_of(config: TrainConfig, name: str, hidden_size: int | None = None) -> TrainConfig:
    """The run's training with a variant's changes; its rank is at most `hidden_size`."""
    changes = VARIANTS[name].changes(config)
    if "rank" in changes and hidden_size is not None:
        changes["rank"] = min(changes["rank"], hidden_size)
    where = f"compare.systems: {name}: train"
    return validate_section(TrainConfig, {**config.model_dump(), **changes, "stream": False}, where)


def count(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_adapter(config: TrainConfig) -> str:
    """What a training makes, for a table: form, rank, and stage 1."""
    form = "residual" if config.residual else "low-rank"
    stages = {"closed_form": "closed form", "adam": "Adam", "none": "no stage 1"}
    return f"{form} r = {config.rank}, {stages[config.solver]}"
