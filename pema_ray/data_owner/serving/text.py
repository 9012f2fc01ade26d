"""Turns tokens into text as they come: only what later tokens cannot change, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # what a tokenizer says of bytes that are no whole character yet


class TextStream:
    """The text of one answer.

    Args:
        detokenize: token ids → text.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(self, detokenize: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._detokenize, self._stop = detokenize, tuple(stop)
        self._tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be told now that this token has come; sets `stopped` when a stop string is complete."""
        self._tokens.append(token)
        return self._tell(self._detokenize(self._tokens), last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return "" if self.stopped else self._tell(self._detokenize(self._tokens), last=True)

    def _tell(self, whole: str, last: bool) -> str:
        ends = [at for s in self._stop if (at := whole.find(s)) >= 0]
        if ends:
            self.stopped, known = True, whole[: min(ends)]
        elif last:
            known = whole
        else:
            known = whole.rstrip(_UNFINISHED)
            known = known[: len(known) - self._may_begin_a_stop(known)]
        if not known.startswith(self.text):  # the tokenizer has changed its mind about what was told: hold on
            return ""
        new, self.text = known[len(self.text) :], known
        return new

    def _may_begin_a_stop(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0
        )
