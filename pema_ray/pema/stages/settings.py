"""What a stage's help says of its settings, read from the configuration itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from pema_ray.pema.config import ExperimentConfig

# stage → the sections it reads beside `run_dir` and `seed`
SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("task",),
    "export_head": ("plm",),
    "build_memory": ("build_memory", "ray"),
    "train": ("train", "ray"),
    "generate": ("generate", "ray"),
    "evaluate": ("evaluate", "ray"),
    "report": (),
    "compare": ("compare", "ray"),
}


class Setting(NamedTuple):
    key: str
    default: str
    meaning: str


def settings_of(stage: str) -> Iterator[Setting]:
    """Every setting of the sections that a stage reads."""
    for section in SECTIONS[stage]:
        model = ExperimentConfig.model_fields[section].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, field in model.model_fields.items():
            unset = field.default in (None, ()) or field.default == {}
            choices = (
                f"({' | '.join(map(str, get_args(field.annotation)))}) "
                if get_origin(field.annotation) is Literal
                else ""
            )
            default = "" if unset else str(field.default)
            yield Setting(f"{section}.{name}", default, choices + (field.description or ""))
