"""The text of one answer as its tokens come: stop strings are cut, and only certain text is emitted."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pema_ray.line.tokenizer import PLMTokenizer

_BEFORE_WORDS = "\n "  # at the start of an answer, stop strings do not match these


class AnswerText:
    """Detokenises one answer. It keeps only text that may still become a stop string, so a token costs O(1).

    Args:
        stop: strings that end the answer and are not part of it. They match from its first word on, so that an answer
            may begin with a newline. A special token matches although its text is hidden.
    """

    def __init__(self, tokenizer: PLMTokenizer, stop: Sequence[str] = ()) -> None:
        self._stream = tokenizer.stream()
        self._stop_ids = {i for s in stop if (i := tokenizer.special_id(s)) is not None}
        self._stop = tuple(stop)
        self._pending, self._in_words = "", False
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` when a stop string is complete."""
        if token in self._stop_ids:
            rest = self._take(self._stream.finish(), last=True)
            self.stopped = True
            return rest
        return self._take(self._stream.push(token), last=False)

    def finish(self) -> str:
        """The remaining text, at the end of the answer."""
        return "" if self.stopped else self._take(self._stream.finish(), last=True)

    def fork(self) -> AnswerText:
        """A copy for another answer that begins with the same tokens."""
        fork = copy.copy(self)
        fork._stream = self._stream.fork()
        return fork

    def _take(self, new: str, last: bool) -> str:
        text = self._pending + new
        words = text if self._in_words else text.lstrip(_BEFORE_WORDS)
        self._in_words = bool(words) or self._in_words
        begin = len(text) - len(words)
        stops = [at for s in self._stop if (at := text.find(s, begin)) >= 0]
        if stops:
            self.stopped, end = True, min(stops)
        else:
            end = len(text) if last else len(text) - self._may_stop(words)
        self._pending = text[end:]
        return text[:end]

    def _may_stop(self, words: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=0) - 1, len(words))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(words[-n:]) for s in self._stop)), 0)
