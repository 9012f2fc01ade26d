"""A decoding session that outlives its cache. B sequences, H hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pema_ray.line.source import ContextSource, SessionLost


class DecodingSession:
    """A session of a `ContextSource`: it *is* its token ids, and is opened again with them when its cache is lost.

    Attributes:
        state_BH: representations after the last token of every row, `[B, H]`.
    """

    state_BH: torch.Tensor

    def __init__(self, source: ContextSource, prompts: Sequence[Sequence[int]]) -> None:
        self._source = source
        self._ids = [list(prompt) for prompt in prompts]
        self._open()

    def _open(self) -> None:
        self._name, self.state_BH = self._source.open(self._ids)
        self._position = 0

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Continue row `rows[i]` with `tokens[i]`; rows left out are dropped, rows named twice are forked."""
        self._ids = [[*self._ids[row], token] for row, token in zip(rows, tokens, strict=True)]
        try:
            self.state_BH = self._source.extend(self._name, self._position, rows, tokens)
            self._position += 1
        except SessionLost:
            self._open()

    def admit(self, prompts: Sequence[Sequence[int]]) -> None:
        """New rows join, after those that are there."""
        self._ids += [list(prompt) for prompt in prompts]
        try:
            new = self._source.admit(self._name, self._position, prompts)
            self.state_BH = torch.cat([self.state_BH, new])
            self._position += 1
        except SessionLost:
            self._source.close(self._name)
            self._open()

    def close(self) -> None:
        """Let the PLM owner forget the session."""
        self._source.close(self._name)
