"""Tasks for fine-tuning and scoring a PlugLM model; `make_task` makes one from its settings."""

from __future__ import annotations

from pema_ray.pluglm.finetune_config import TaskSettings
from pema_ray.pluglm.tasks.cloze import Cloze
from pema_ray.pluglm.tasks.sequences import Classification, Regression, YesNo
from pema_ray.pluglm.tasks.spans import Factoid, Spans
from pema_ray.pluglm.tasks.task import Feature, FinetuningTask
from pema_ray.pluglm.tasks.words import Words

__all__ = ["Feature", "FinetuningTask", "make_task"]


def make_task(settings: TaskSettings) -> FinetuningTask:
    """The task of a kind. Raises `UserError` for an unknown metric."""
    c = settings
    columns = (c.text_column, c.pair_column, c.label_column)
    if c.kind == "classification":
        return Classification(columns, c.header, c.metric or "accuracy")
    if c.kind == "regression":
        return Regression(columns, c.header, c.metric or "glue/stsb")
    if c.kind == "answers":
        return Spans(c.stride, c.longest_answer)
    if c.kind == "factoid":
        return Factoid(c.stride, c.longest_answer)
    return {"tokens": Words, "yes_no": YesNo, "cloze": Cloze}[c.kind]()
