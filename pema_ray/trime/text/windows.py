"""Evaluation windows over a stream of tokens: every token is scored exactly once, the overlap is context only.

Knows numbers alone. A window reads `token[start:end]`; its inputs from `first` on predict `token[first + 1 : end + 1]`,
and those before `first` were scored by the window before (fairseq's `context_window`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pema_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `start … end - 1`, of which `first … end - 1` are scored."""

    start: int
    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def scored(self) -> int:
        return self.end - self.first


def plan_windows(tokens: int, tokens_per_sample: int, context_window: int) -> list[Window]:
    """Windows over a stream of `tokens` tokens, `tokens_per_sample - context_window` newly scored ones in each.

    The stream's first token has no context and is not scored; its last is never an input.

    Raises:
        UserError: no room for new tokens in a window, or a stream of fewer than two tokens.
    """
    new = tokens_per_sample - context_window
    if new < 1 or context_window < 0:
        raise UserError(
            f"evaluate: a window of {tokens_per_sample} tokens with {context_window} of context has no room for new "
            "tokens. Set evaluate.context_window below evaluate.tokens_per_sample."
        )
    if tokens < 2:
        raise UserError(f"evaluate: a text of {tokens} token(s): at least two are needed to predict one.")
    last = tokens - 1
    return [Window(max(0, first - context_window), first, min(first + new, last)) for first in range(0, last, new)]


def batches(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Consecutive windows, `size` at a time."""
    for begin in range(0, len(windows), size):
        yield windows[begin : begin + size]
