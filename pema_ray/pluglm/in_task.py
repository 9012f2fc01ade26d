"""In-task memory: training examples as entries, `text label`, which they must not retrieve themselves.

An example's document is named by what it says, its label apart. So with `config.exclude_own` neither an example nor
a copy of it, in training or outside it, can read off its own label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pema_ray.errors import UserError
from pema_ray.pluglm.entries import NewEntry
from pema_ray.pluglm.tasks.reading import Example
from pema_ray.pluglm.tasks.task import Task

TAG = "in-task"
SOURCE = "training examples"


def entries_of(task: Task, examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> list[NewEntry]:
    """Entries of training examples. A long text is cut so that its label stays.

    Raises:
        UserError: a label alone is longer than an entry may be.
    """
    found = []
    for example in examples:
        label = task.told(example)
        if "[MASK]" in example.text:
            found.append(NewEntry(example.text.replace("[MASK]", label), SOURCE, example.document_id, (TAG,)))
            continue
        said = " ".join(one for one in (example.text, example.pair) if one)
        room = max_tokens - tokenizer.num_special_tokens_to_add() - len(_spans(tokenizer, f" {label}"))
        if room < 1:
            raise UserError(f"Training example {example.id}: its label leaves no room in {max_tokens} tokens.")
        spans = _spans(tokenizer, said)
        kept = said if len(spans) <= room else said[: spans[room - 1][1]]
        found.append(NewEntry(f"{kept} {label}", SOURCE, example.document_id, (TAG,)))
    return found


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
