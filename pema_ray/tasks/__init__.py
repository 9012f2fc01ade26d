"""Tasks as data: what the pairs are, how a prompt is worded, how an answer is tidied. Knows no model.

`task.py` holds the typed YAML, `sources.py` reads files, `bible.py` the packaged corpus,
`prompts.py` turns a pair into token ids, `postprocess.py` tidies an answer.
"""

from pema_ray.tasks.prompts import EncodedPair, Prompter
from pema_ray.tasks.sources import Pair, load_pairs
from pema_ray.tasks.task import Task, list_tasks, load_task

__all__ = ["EncodedPair", "Pair", "Prompter", "Task", "list_tasks", "load_pairs", "load_task"]
