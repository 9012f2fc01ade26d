"""`ContextSource`: everything a data owner may ask of a PLM owner. Symbols: B, N, H as in `messages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pema_ray.line.lm_head import LMHeadBundle
from pema_ray.line.messages import ExtractBatch, ModelCard


class SessionLost(Exception):
    """The PLM owner no longer holds this session's cache: open it again with the ids so far."""


class ContextSource(Protocol):
    """A PLM owner, as seen from the data owner's side of the line.

    Representations are the last hidden states *before* the final norm; `LMHead.norm` applies it.
    A session decodes a batch of sequences together. It *is* their token ids: the key-value cache behind
    it is only a cache, and a lost one is rebuilt by opening the ids so far.
    """

    def describe(self) -> ModelCard:
        """Name, fingerprint and sizes of the PLM."""
        ...

    def lm_head(self) -> LMHeadBundle:
        """Final norm, LM head and tokenizer."""
        ...

    def extract(self, batch: ExtractBatch) -> torch.Tensor:
        """Representations `[N, H]` of the wanted positions, sequence after sequence, on the CPU."""
        ...

    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[str, torch.Tensor]:
        """Start decoding B prompts: a session id and the representations `[B, H]` of their last tokens."""
        ...

    def extend(self, session: str, position: int, rows: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Continue row `rows[i]` of the session with `tokens[i]`; the session's rows become these.

        Leaving a row out drops it; naming it twice forks it (beam search).

        Args:
            position: extensions and admissions made so far; a mismatch means the two sides lost step.

        Returns:
            Representations `[len(rows), H]` after the new tokens.

        Raises:
            SessionLost: the session is unknown or out of step.
        """
        ...

    def admit(self, session: str, position: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """New rows join a running session, after the rows it has (continuous batching).

        Args:
            position: as in `extend`; it counts admissions too.

        Returns:
            Representations `[len(prompts), H]` of the prompts' last tokens.

        Raises:
            SessionLost: as in `extend`, or the PLM's cache takes no newcomers: open all rows' ids anew.
        """
        ...

    def close(self, session: str) -> None:
        """Forget a session; closing one that is gone is not an error."""
        ...
