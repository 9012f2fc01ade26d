"""Every setting of a configuration file: its value, its default, what it means and which stages read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.experiment.method import Method, Stage, meaning_of, section_in
from pema_ray.runtime.settings import read_yaml


@dataclass(frozen=True)
class ExplainedSetting:
    """A setting as a file has it; values are written as in JSON, which is YAML too."""

    key: str
    value: str
    default: str | None
    """None: the file must give it."""
    meaning: str
    read_by: tuple[str, ...]
    """Subcommands of stages."""

    @property
    def is_changed(self) -> bool:
        return self.value != self.default


def explain(
    methods: Sequence[Method[Any]], path: Path, overrides: Sequence[str] = ()
) -> tuple[Method[Any], list[ExplainedSetting]]:
    """The method whose configuration a file is, and its settings in the order of their declaration.

    Raises:
        UserError: the file cannot be read as any method's configuration; in the words of the kind that knows most of
            its sections.
    """
    kinds: dict[type[BaseModel], list[tuple[Method[Any], str]]] = {}
    for method in methods:
        for stage in method.stages:
            kinds.setdefault(method.config_of(stage), []).append((method, stage))
    keys = _keys(read_yaml(path)) | {override.partition("=")[0] for override in overrides}
    if "applications" in keys:
        raise UserError(f"{path}: is a Serve file, for `serve run`, and no experiment; docs/serving.md explains it.")
    if {"name", "template"} <= keys:
        raise UserError(f"{path}: is a task's definition, and no experiment; an experiment names it in task.name.")
    kind = min(kinds, key=lambda kind: _misfit(kind, keys))
    config = read_config(kind, path, overrides)
    stages = [(method.subcommand(stage), method.stages[stage]) for method, stage in kinds[kind]]
    return kinds[kind][0][0], list(_settings(config, "", stages))


def _keys(data: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Every key with those of its sections: `train`, `train.rank`."""
    keys: set[str] = set()
    for name, value in data.items():
        keys |= {f"{prefix}{name}"} | (_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else set())
    return keys


def _misfit(kind: type[BaseModel], keys: set[str]) -> tuple[int, int, int]:
    """How many (sections a kind does not know, sections it needs and the file has not, keys it does not know)."""
    fields = kind.model_fields
    needed = {name for name, field in fields.items() if field.is_required()}
    unknown = [key for key in keys if not _knows(kind, key)]
    return sum("." not in key for key in unknown), len(needed - keys), len(unknown)


def _knows(kind: type[BaseModel], key: str) -> bool:
    """Whether a kind has a setting; what a mapping holds, it may hold."""
    name, _, rest = key.partition(".")
    field = kind.model_fields.get(name)
    if field is None:
        return False
    section = section_in(field.annotation)
    return not rest or section is None or _knows(section, rest)


def _settings(
    section: BaseModel, prefix: str, stages: Sequence[tuple[str, Stage]], default: BaseModel | None = None
) -> Iterator[ExplainedSetting]:
    """Of a section.

    Args:
        default: what the section is when nobody says anything, where that is not its class's own.
    """
    for name, field in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        usual = _default(field) if default is None else getattr(default, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{key}.", stages, usual if type(usual) is type(value) else None)
            continue
        readers = tuple(dict.fromkeys(command for command, stage in stages if _reads(stage, key)))
        unset = usual is _REQUIRED
        yield ExplainedSetting(key, _written(value), None if unset else _written(usual), meaning_of(field), readers)


_REQUIRED: Any = object()


def _default(field: FieldInfo) -> Any:
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _reads(stage: Stage, key: str) -> bool:
    """Whether a stage reads a setting; all of them read those that are in no section, such as `seed`."""
    named = {*stage.reads, *stage.depends_on, *stage.also_reads}
    return key in ("run_dir", "seed") or any(key == one or key.startswith(f"{one}.") for one in named)


def _written(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=lambda other: getattr(other, "model_dump", other.__str__)())
