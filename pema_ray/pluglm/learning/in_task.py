"""In-task memory: training examples as entries, `text label`; no example may retrieve itself.

An example's document id is a hash of it without its label. So with `config.exclude_own` neither an example nor a copy
of it, in training or in validation, can read its own label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.tasks.reading import TaskExample
from pema_ray.pluglm.tasks.task import FinetuningTask

TAG = "in-task"
SOURCE = "training examples"


def entries_of(
    task: FinetuningTask, examples: Sequence[TaskExample], tokenizer: Any, max_tokens: int
) -> list[NewEntry]:
    """Entries of training examples. Long texts are cut; labels are kept.

    Raises:
        UserError: a label alone is too long for an entry.
    """
    entries = []
    for example in examples:
        label, is_cloze = task.label_text(example), task.kind == "cloze"
        room = max_tokens - tokenizer.num_special_tokens_to_add() - len(_spans(tokenizer, f" {label}"))
        if room < 1:
            raise UserError(f"Training example {example.id}: its label leaves no room in {max_tokens} tokens.")
        before, after = " ".join(text for text in (example.text, example.pair) if text), ""
        if is_cloze:
            before, _, after = example.text.partition("[MASK]")
        before_spans, after_spans = _spans(tokenizer, before), _spans(tokenizer, after)
        # the text before the label gets at least half of the room, and all that the text after it does not need
        before_tokens = min(len(before_spans), room - min(len(after_spans), room // 2))
        after_tokens = min(len(after_spans), room - before_tokens)
        if not before_tokens:
            before = ""
        elif is_cloze:  # the words nearest to the answer
            before = before[before_spans[-before_tokens][0] :]
        else:
            before = before[: before_spans[before_tokens - 1][1]]
        after = after[: after_spans[after_tokens - 1][1]] if after_tokens else ""
        text = f"{before}{label}{after}" if is_cloze else f"{before} {label}".strip()
        entries.append(NewEntry(text, SOURCE, example.document_id, (TAG,)))
    return entries


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
