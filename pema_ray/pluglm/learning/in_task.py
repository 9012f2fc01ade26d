"""In-task memory: training examples as entries, `text label`, which they must not retrieve themselves.

An example's document is named by what it says, its label apart. So with `config.exclude_own` neither an example nor
a copy of it, in training or outside it, can read off its own label.
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
    """Entries of training examples. A long text is cut so that its label stays.

    Raises:
        UserError: a label alone is longer than an entry may be.
    """
    found = []
    for example in examples:
        label = task.label_text(example)
        before, after = said_around(task, example)
        room = max_tokens - tokenizer.num_special_tokens_to_add() - len(_spans(tokenizer, f" {label}"))
        if room < 1:
            raise UserError(f"Training example {example.id}: its label leaves no room in {max_tokens} tokens.")
        ahead, behind = _spans(tokenizer, before), _spans(tokenizer, after)
        # what stands before the label may have all the room that the rest leaves, and at least half of it
        least = min(len(behind), room // 2)
        kept = min(len(ahead), room - least)
        rest = min(len(behind), room - kept)
        if task.kind == "cloze":  # the words nearest to the answer
            before = before[ahead[-kept][0] :] if kept else ""
        else:
            before = before[: ahead[kept - 1][1]] if kept else ""
        after = after[: behind[rest - 1][1]] if rest else ""
        text = f"{before}{label}{after}" if task.kind == "cloze" else f"{before} {label}".strip()
        found.append(NewEntry(text, SOURCE, example.document_id, (TAG,)))
    return found


def said_around(task: FinetuningTask, example: TaskExample) -> tuple[str, str]:
    """What stands before and behind the label: of a cloze sentence around its mask, of others all before it."""
    if task.kind == "cloze":
        before, _, after = example.text.partition("[MASK]")
        return before, after
    return " ".join(one for one in (example.text, example.pair) if one), ""


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
