"""An experiment's choice of task: its files, limits, examples in prompts and chat."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pema_ray.runtime.settings import Section


class TaskConfig(Section):
    """The task, its files, and the number of its pairs."""

    name: str = "bible_modern"
    """A shipped task (`pema-ray prepare --list`) or the path of a task's YAML file."""
    files: dict[str, str] = {}
    """Split -> file (JSON Lines, Parquet, CSV) for tasks whose data the user brings."""
    limits: dict[str, int] = {}
    """Split -> number of pairs to keep, drawn with `seed`; all pairs of a split that is not named."""
    max_rejected: int = Field(default=0, ge=0)
    """Lines with an empty source or target, over all splits, that are skipped; more of them are an error."""
    shots: int = Field(default=0, ge=0)
    """Pairs of the training split shown as examples in every prompt."""
    show: Literal["first", "similar"] = "first"
    """Choice of examples: the first pairs, the same in every prompt, or those with the most similar sources."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template beside the messages, such as `enable_thinking: false` (Qwen3)."""
