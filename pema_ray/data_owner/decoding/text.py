"""The text of one answer as its tokens come: stop strings are cut, and only certain text is emitted."""

from __future__ import annotations

from collections.abc import Sequence

from pema_ray.line.tokenizer import PLMTokenizer

_BEFORE_WORDS = "\n "  # at the start of an answer these neither stop nor count


class AnswerText:
    """Detokenises one answer.

    Args:
        stop: strings that end the answer; they are not part of it. They count from its first word on, so that an answer
            may begin with a newline. A special token is seen although its text is hidden.
    """

    def __init__(self, tokenizer: PLMTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._stop_ids = {i for s in stop if (i := tokenizer.special_id(s)) is not None}
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        self._text, self._emitted = "", 0
        self._first_word: int | None = None
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` when a stop string is complete."""
        self._tokens.append(token)
        if token in self._stop_ids:
            self.stopped = True
            return self._take(self._stream.finish(), last=True)
        return self._take(self._stream.push(token), last=False)

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        return "" if self.stopped else self._take(self._stream.finish(), last=True)

    def fork(self) -> AnswerText:
        """Another answer that begins with the same tokens."""
        other = AnswerText(self._tokenizer, self._stop)
        for token in self._tokens:
            other.push(token)
        return other

    def _take(self, new: str, last: bool) -> str:
        known = len(self._text)
        self._text += new
        if self._first_word is None and (stripped := self._text.lstrip(_BEFORE_WORDS)):
            self._first_word = len(self._text) - len(stripped)
        end = len(self._text)
        if self._first_word is not None and self._stop:
            begin = max(self._first_word, known - self._longest + 1, self._emitted)
            found = [at for s in self._stop if (at := self._text.find(s, begin)) >= 0]
            if found:
                self.stopped, end = True, min(found)
            elif not last:
                end -= self._held_back(begin)
        emitted, self._emitted = self._text[self._emitted : end], max(end, self._emitted)
        return emitted

    def _held_back(self, begin: int) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = min(self._longest - 1, len(self._text) - begin)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)
