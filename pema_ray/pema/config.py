"""A PEMA experiment, typed: YAML in, a frozen `ExperimentConfig` out.

A file may name another with `extends: other.yaml` and change only what differs; the command line changes single
values with `section.key=value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.training.config import PrefixConfig, TrainConfig
from pema_ray.errors import nearest
from pema_ray.experiment.configuration import read_config
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.pema.baselines.config import KnnSettings, LoraSettings, SmallLMSettings
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.placement import PlacementConfig
from pema_ray.runtime.settings import Folder, Section, Share
from pema_ray.tasks.config import TaskConfig


class EvaluateConfig(Section):
    """Scores, comparisons and the sweep over λ."""

    lambdas: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
    """Constant λ at which the likelihood is measured; `generate.lambda_max` is added."""
    generate_lambdas: tuple[float, ...] = (0.5, 1.0)
    """λ_max values to generate with, beside `generate.lambda_max` and the PLM alone."""
    few_shot: int = Field(default=3, ge=0)
    """Shots of the few-shot PLM baseline; 0 leaves it out."""
    sample_pairs: int = Field(default=24, ge=1)
    """Examples in the report."""

    @field_validator("lambdas", "generate_lambdas")
    @classmethod
    def _are_probabilities(cls, lambdas: tuple[float, ...]) -> tuple[float, ...]:
        for value in lambdas:
            if not 0 <= value <= 1:
                raise ValueError(f"λ must lie in [0, 1], not {value}")
        return lambdas


SYSTEMS = (
    "copy", "plm", "few_shot", "few_shot_similar", "knn", "pema", "pema_shots", "pema_published", "pema_kappa_0",
    "pema_no_stage_1", "pema_adam", "pema_predicted_lambda", "memory_decoder", "proxy_tuning", "lora", "lora_shots",
    "prefix", "pema_prefix", "pema_look_back", "pema_local_memory",
)  # fmt: skip


class CompareConfig(Section):
    """PEMA beside its peers on the same pairs, decoded as `generate` says."""

    systems: tuple[str, ...] = SYSTEMS[:-4]
    """Systems to compare; leave out what takes too long (`lora` trains the whole PLM, `pema_published` trains for many
    epochs). `prefix` and `pema_prefix` need a PLM owner that takes prefixes, `pema_look_back` and `pema_local_memory`
    `build_memory.prompts`."""
    few_shot: int = Field(default=3, ge=1)
    """Examples in the prompts of the few-shot systems: the first training pairs (`few_shot`, `pema_shots`,
    `lora_shots`), or the most similar ones (`few_shot_similar`)."""
    seeds: int = Field(default=1, ge=1)
    """Trainings of each trained system, with consecutive seeds from the run's on."""
    single_seed: tuple[str, ...] = (
        "pema_published", "memory_decoder", "proxy_tuning", "prefix", "pema_prefix", "lora", "lora_shots",
    )  # fmt: skip
    """Slow systems that are trained with one seed only."""
    lambdas: tuple[Share, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """λ tried for each adapter if `generate.schedule` is constant; the best NLL on the dev memory wins. Empty: always
    `lambda_max`."""
    dev_rows: int = Field(default=4096, ge=1)
    """Rows of the dev memory that λ is chosen by."""
    bootstrap_samples: int = Field(default=1000, ge=0)
    """Samples of the paired bootstrap against `pema`; 0: no test."""
    knn: KnnSettings = KnnSettings()
    """Settings of kNN-LM."""
    small_lm: SmallLMSettings = SmallLMSettings()
    """Settings of `memory_decoder` and `proxy_tuning`."""
    lora: LoraSettings = LoraSettings()
    """Settings of LoRA."""

    @field_validator("systems", "single_seed")
    @classmethod
    def _are_known(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for name in systems:
            if name not in SYSTEMS:
                raise ValueError(f"'{name}' is no system.{nearest(name, SYSTEMS)}")
        return systems


class ExperimentConfig(Section):
    """A whole experiment; every stage reads its own section and the shared ones."""

    run_dir: Folder = "runs/experiment"
    """The run folder, which holds the results of all stages."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw: pairs, shuffling, dropout, sampling."""
    plm: PLMConfig = PLMConfig()
    task: TaskConfig = TaskConfig()
    ray: RayConfig = RayConfig()
    placement: PlacementConfig = PlacementConfig()
    prefix: PrefixConfig = PrefixConfig()
    build_memory: BuildMemoryConfig = BuildMemoryConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _has_prompts_to_look_back_at(self) -> ExperimentConfig:
        settings = {"train.look_back": self.train.look_back, "train.local_memory": self.train.local_memory}
        settings |= {name: name in self.compare.systems for name in ("pema_look_back", "pema_local_memory")}
        for name, is_on in settings.items():
            if is_on and not self.build_memory.prompts:
                raise ValueError(f"{name} needs build_memory.prompts=true: rows of prompts in the memory")
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A PEMA experiment from YAML, with `section.key=value` overrides; raises as `read_config` does."""
    return read_config(ExperimentConfig, path, overrides)
