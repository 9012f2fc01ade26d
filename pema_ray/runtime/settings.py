"""Typed settings: sections of YAML, checked, with errors for users. Knows no method and no stage.

Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pema_ray.errors import UserError, nearest

Split = Literal["train", "dev", "test"]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _folder(value: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ValueError("is no folder: name one on a disk that all nodes share, such as a mounted bucket")
    return value


Folder = Annotated[str, AfterValidator(_folder)]
"""A folder's path. Addresses such as `s3://…` are refused: a folder of that name would be made."""


def validate(model: type[BaseModel], data: Any, where: str, overrides: Collection[str] = ()) -> Any:
    """`model.model_validate(data)`, with pydantic's error turned into one line for the user.

    Args:
        where: the source of the data.
        overrides: keys that come from the command line instead.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        if any(f"{location}.".startswith(f"{key}.") for key in overrides):
            where = "command line"
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _known_keys(model, first["loc"][:-1]))
            raise UserError(f"{where}: unknown key '{location}'.{hint}") from None
        given = f", got {first['input']!r}" if not isinstance(first.get("input"), Mapping) else ""
        place = f"'{location}': " if location else ""
        raise UserError(f"{where}: {place}{first['msg'].removeprefix('Value error, ')}{given}.") from None


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a missing or malformed file is a `UserError` that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start}).") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found a {type(data).__name__}.")
    return data


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' refers back to itself.")
    data = read_yaml_mapping(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: 'extends' must be a file name, got {parent!r}.")
    return _merge(read_yaml(path.parent / parent, (*seen, path.resolve())), data)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
