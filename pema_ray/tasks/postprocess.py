"""Rules that tidy a generated answer. Off unless a task names them: each one can damage valid text.

Rules against hallucinated continuations follow those of the published runs (whose code cut at fixed phrases);
here each rule is separate and named, and the metrics say how often it changed an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Rule = Callable[[str, str], str]  # (answer, source) -> answer


def first_line(answer: str, source: str) -> str:
    """Keep the first line that is not empty."""
    return answer.strip().split("\n", 1)[0].strip()


def strip_spaces(answer: str, source: str) -> str:
    """Trim, and turn runs of white space into one space."""
    return " ".join(answer.split())


def cut_echoed_prompt(answer: str, source: str) -> str:
    """Cut where the answer, after some text of its own, repeats the source."""
    at = answer.find(source, 1) if source else -1
    return answer[:at].rstrip() if at > 0 else answer


def collapse_repeats(answer: str, source: str) -> str:
    """Turn a word said three or more times in a row into one."""
    return re.sub(r"\b(\w+)(?:\s+\1\b){2,}", r"\1", answer)


def cut_small_talk(answer: str, source: str) -> str:
    """Cut chatter that small models append: ` I'm …`, ` ......`."""
    return re.split(r" I['’]m\b| \.{4,}", answer, maxsplit=1)[0].rstrip()


RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (first_line, strip_spaces, cut_echoed_prompt, collapse_repeats, cut_small_talk)
}


def tidy(answer: str, source: str, rules: Sequence[str]) -> tuple[str, list[str]]:
    """Apply the named rules in order: the answer, and the rules that changed it."""
    changed = []
    for name in rules:
        before, answer = answer, RULES[name](answer, source)
        if answer != before:
            changed.append(name)
    return answer, changed
