"""A method as a table of stages. Help texts, jobs, commands and run folders come from the table. Knows no method.

A new method is one `Method`; a new stage is one `Stage` in it, and a module with `run(config) -> metrics`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pema_ray.experiment.configuration import read_config
from pema_ray.experiment.process import guarded
from pema_ray.runtime.environment import quiet_libraries

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class Stage:
    """One stage: what it does, what its result depends on, and what it leaves in `<run_dir>/<name>/`."""

    does: str
    """One or two sentences, for users."""
    module: str | None
    """Has `run(config) -> metrics`. None: the command of another stage does this one as well."""
    reads: tuple[str, ...] = ()
    """Sections of the configuration that its help lists, beside `run_dir` and `seed`."""
    also_reads: tuple[str, ...] = ()
    """Sections, or single settings, of other stages that it reads too; its help does not list them."""
    depends_on: tuple[str, ...] = ()
    """Sections, or single settings (`batches.segment`), that its stamp covers."""
    parents: tuple[str, ...] = ()
    """The stages that it is made from."""
    evidence: tuple[str, ...] = ()
    """Files without which its metrics are not believed."""
    command: str = ""
    """Of the command line, where it is not the stage's name."""
    in_chain: bool = True
    """Whether a run of all stages includes it."""
    config: type[BaseModel] | None = None
    """Where it is another kind than the method's."""
    example: str = ""
    """A configuration file that its help names, where it is not the method's."""


class Setting(NamedTuple):
    """A setting as help texts show it."""

    key: str
    default: str
    """Empty where there is none."""
    meaning: str


@dataclass(frozen=True)
class Method(Generic[C]):
    """A table of stages over one kind of configuration."""

    prefix: str
    """Before every command, such as `pema-ray trime`."""
    config: type[C]
    example: str
    """A configuration file that help texts name."""
    stages: Mapping[str, Stage]

    @property
    def chain(self) -> tuple[str, ...]:
        """The stages of a whole run, in order, each of which `run` does."""
        return tuple(name for name, stage in self.stages.items() if stage.in_chain and stage.module is not None)

    def command(self, stage: str) -> str:
        """What a user types to run a stage."""
        return f"{self.prefix} {self.subcommand(stage)}"

    def subcommand(self, stage: str) -> str:
        return self.stages[stage].command or stage.replace("_", "-")

    def config_of(self, stage: str) -> type[BaseModel]:
        """The kind of configuration that a stage reads."""
        return self.stages[stage].config or self.config

    def example_of(self, stage: str) -> str:
        """A configuration file of a stage."""
        return self.stages[stage].example or self.example

    def needs_file(self, stage: str) -> bool:
        """Whether its configuration has settings without a default."""
        return any(field.is_required() for field in self.config_of(stage).model_fields.values())

    def read(self, stage: str, path: Path | None, overrides: Sequence[str] = ()) -> Any:
        """A stage's configuration from a file; raises as `read_config` does."""
        return read_config(self.config_of(stage), path, overrides)

    def run(self, stage: str, config: Any) -> dict[str, Any]:
        """Do a stage; its metrics."""
        module = self.stages[stage].module
        if module is None:
            raise ValueError(f"'{stage}' is no stage of its own: {self.command(stage)} does it")
        quiet_libraries()  # before the stage's module imports Ray and transformers
        return import_module(module).run(config)

    def run_stage(self, stage: str, path: Path | None, overrides: Sequence[str]) -> int:
        """Read a configuration and do a stage; the exit code."""
        return guarded(lambda: self.run(stage, self.read(stage, path, overrides)))

    def settings_of(self, stage: str) -> Iterator[Setting]:
        """Every setting that a stage reads."""
        fields = self.config_of(stage).model_fields
        for name in self.stages[stage].reads:
            yield from _settings(name, fields[name])

    def job(self, stage: str) -> None:
        """Entry point of `jobs/<stage>.py`: `--config <file> [section.key=value ...]`."""
        settings = "\n".join(
            f"  {one.key}{'=' + one.default if one.default else ''}\n      {one.meaning}"
            for one in self.settings_of(stage)
        )
        parser = argparse.ArgumentParser(
            description=self.stages[stage].does,
            epilog=f"settings:\n{settings}" if settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--config", type=Path, required=True, help=f"an experiment's YAML file, such as {self.example_of(stage)}"
        )
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
        arguments = parser.parse_args()
        sys.exit(self.run_stage(stage, arguments.config, arguments.overrides))


def _settings(key: str, field: FieldInfo) -> Iterator[Setting]:
    section = section_in(field.annotation)
    if section is not None:
        for name, inner in section.model_fields.items():
            yield from _settings(f"{key}.{name}", inner)
        return
    unset = field.is_required() or field.default in (None, ()) or field.default == {}
    yield Setting(key, "" if unset else str(field.default), meaning_of(field))


def meaning_of(field: FieldInfo) -> str:
    """A setting's description, with the values to choose from."""
    is_choice = get_origin(field.annotation) is Literal
    choices = f"({' | '.join(map(str, get_args(field.annotation)))}) " if is_choice else ""
    return choices + " ".join((field.description or "").split())


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting is, or may be."""
    kinds = (annotation, *get_args(annotation)) if get_origin(annotation) in (None, Union, UnionType) else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
