"""A task's YAML file, typed: template, columns, source, style pattern, post-processing."""

from __future__ import annotations

import re
import string
from importlib.resources import files
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from pema_ray.errors import UserError, nearest
from pema_ray.runtime.settings import Section, read_yaml_mapping, validate
from pema_ray.tasks.postprocess import RULES


class Columns(Section):
    source: str = "source"
    target: str = "target"


class BookSplit(Section):
    """Two packaged translations of the Bible, split by book, so that no test text is in the training split."""

    source: str = "kjv"
    """The package `pythonbible-<source>`."""
    target: str = "web"
    dev: tuple[str, ...]
    test: tuple[str, ...]


class PackageSplit(Section):
    """Functions of installed packages and their docstrings, split by subpackage."""

    packages: tuple[str, ...] = Field(min_length=1)
    """Import names."""
    dev: tuple[str, ...]
    """Modules or subpackages, dotted."""
    test: tuple[str, ...]
    max_characters: int = Field(default=300, ge=1)
    """Longest code of a function, without its docstring; longer ones are left out."""


class Source(Section):
    """Where pairs come from: `files` (split -> path), the packaged `bible` corpus, or `docstrings` of packages."""

    files: dict[str, str] = {}
    bible: BookSplit | None = None
    docstrings: PackageSplit | None = None

    @model_validator(mode="after")
    def _is_one_corpus(self) -> Source:
        if self.bible and self.docstrings:
            raise ValueError("give bible or docstrings, not both")
        return self


class Task(Section):
    """What to do with a pair of texts."""

    name: str
    description: str = ""
    template: str
    """The prompt, with `{source}`; text before it is the same for every pair."""
    chat_system: str | None = None
    """The system message, when prompts are rendered as a chat (`task.chat`). Empty differs from none: many templates
    replace a missing one by a default."""
    chat_user: str = "{source}"
    """The user's message, with `{source}`."""
    columns: Columns = Columns()
    source: Source = Source()
    archaic_pattern: str | None = None
    """A regular expression that matches the *old* style; fewer outputs should match it."""
    postprocess: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings that end an answer (beside the tokenizer's EOS)."""
    sacrebleu_language: str = Field("en", description="Target language, for sacreBLEU's tokenizer.")

    @field_validator("template", "chat_user")
    @classmethod
    def _names_the_source(cls, template: str) -> str:
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise ValueError(f"not a template: {error}") from None
        if set(fields) != {"source"}:
            raise ValueError(f"must contain {{source}} and no other field, found {fields}")
        return template

    @field_validator("archaic_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _rules_exist(self) -> Task:
        for rule in self.postprocess:
            if rule not in RULES:
                raise ValueError(f"unknown rule '{rule}'.{nearest(rule, list(RULES))}")
        return self


_DEFINITIONS = files("pema_ray.tasks") / "definitions"


def list_tasks() -> list[str]:
    """Names of the shipped tasks."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _DEFINITIONS.iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """A shipped task by name, or the user's by the path of its YAML file.

    Raises:
        UserError: no such task, broken YAML, or a field that does not hold.
    """
    if name in list_tasks():
        path = Path(str(_DEFINITIONS / f"{name}.yaml"))
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        raise UserError(
            f"Unknown task '{name}'.{nearest(name, list_tasks())} "
            f"Shipped: {', '.join(list_tasks())}; or give a .yaml file."
        )
    return validate(Task, read_yaml_mapping(path), str(path))
