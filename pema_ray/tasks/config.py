"""An experiment's choice of task: its files, limits, examples in prompts and chat."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
)

from pema_ray.runtime.settings import Section


class TaskConfig(Section):
    """Which task, from which files, and how much of it."""

    name: str = "bible_modern"
    """A shipped task (`pema-ray prepare --list`) or the path of a task's YAML file."""
    files: dict[str, str] = {}
    """Split -> file (JSON Lines, Parquet, CSV) for tasks whose data the user brings."""
    limits: dict[str, int] = {}
    """Split -> number of pairs to keep, drawn with `seed`; a split that is not named is kept whole."""
    max_rejected: int = Field(default=0, ge=0)
    """Lines with an empty source or target, over all splits, that are set aside; more of them are refused."""
    shots: int = Field(default=0, ge=0)
    """Pairs of the training split shown as examples in every prompt."""
    show: Literal["first", "similar"] = "first"
    """Which: the first ones, the same in every prompt, or those whose sources are most like the one asked about."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template takes beside the messages, such as `enable_thinking: false` (Qwen3)."""
