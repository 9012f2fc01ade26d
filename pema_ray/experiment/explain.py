"""Every setting of a configuration file: its value, its default, what it means and which stages read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pema_ray.experiment.configuration import read_config
from pema_ray.experiment.method import Method, Stage, meaning_of
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
) -> tuple[type[BaseModel], list[ExplainedSetting]]:
    """The kind of configuration that a file is, and its settings in the order of their declaration.

    Raises:
        UserError: the file cannot be read as any method's configuration; in the words of the kind that knows most of
            its sections.
    """
    kinds: dict[type[BaseModel], list[tuple[Method[Any], str]]] = {}
    for method in methods:
        for stage in method.stages:
            kinds.setdefault(method.config_of(stage), []).append((method, stage))
    sections = read_yaml(path).keys() | {override.partition("=")[0].split(".")[0] for override in overrides}
    kind = min(kinds, key=lambda kind: _misfit(kind, sections))
    config = read_config(kind, path, overrides)
    stages = [(method.subcommand(stage), method.stages[stage]) for method, stage in kinds[kind]]
    return kind, list(_settings(config, "", stages))


def _misfit(kind: type[BaseModel], sections: set[str]) -> tuple[int, int]:
    """(Sections that a kind does not know, sections that it needs and the file has not)."""
    fields = kind.model_fields
    needed = {name for name, field in fields.items() if field.is_required()}
    return len(sections - fields.keys()), len(needed - sections)


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
    named = {*stage.reads, *stage.depends_on}
    return key in ("run_dir", "seed") or any(key == one or key.startswith(f"{one}.") for one in named)


def _written(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=lambda other: getattr(other, "model_dump", other.__str__)())
