"""An experiment's configuration: a YAML file, what it extends, and `section.key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from pema_ray.errors import UserError
from pema_ray.runtime.settings import read_yaml, validate

Model = TypeVar("Model", bound=BaseModel)


def read_config(model: type[Model], path: str | Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read an experiment of any kind from YAML and apply `section.key=value` overrides.

    Raises:
        UserError: the file is missing or broken, a key is unknown, or a value is out of range.
    """
    data = read_yaml(Path(path)) if path else {}
    for override in overrides:
        _apply_override(data, override)
    given = {override.partition("=")[0] for override in overrides}
    return validate(model, data, str(path or "configuration"), given)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"Override '{override}': write it as section.key=value, for example train.rank=64.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"Override '{override}': '{text}' is not a YAML value.") from None
    *sections, last = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"Override '{override}': '{section}' is a value, not a section.")
        data = inner
    data[last] = value
