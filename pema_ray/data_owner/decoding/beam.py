"""Beam search over the mixture: K hypotheses, ranked by log P / length^penalty. K beams, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pema_ray.data_owner.decoding.branch import Branch
from pema_ray.data_owner.decoding.request import SamplingParams, Token
from pema_ray.data_owner.decoding.text import AnswerText

# (branch number, token, its text so far) -> the token of the hypothesis that continues by it
MakeToken = Callable[[int, int, AnswerText], Token]


class BeamSearch:
    """The K beams of one answer.

    Attributes:
        finished: the best finished hypotheses with their scores, best first, at most K.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self.width, self.penalty = sampling.beams, sampling.length_penalty
        self.finished: list[tuple[float, list[Token]]] = []

    def advance(
        self, branches: list[Branch], log_p_KV: torch.Tensor, make_token: MakeToken
    ) -> tuple[list[Branch], list[Branch]]:
        """Grow every hypothesis by a token.

        Returns:
            The branches that continue (none when the search is over), and those that end here.
        """
        held = torch.tensor([[branch.log_prob] for branch in branches], device=log_p_KV.device)
        total = (log_p_KV + held).flatten()
        best, place = total.topk(min(2 * self.width, total.numel()))
        grown: list[tuple[int, Token, AnswerText]] = []
        for order, (score, flat) in enumerate(zip(best.tolist(), place.tolist(), strict=True)):
            number, token = divmod(flat, log_p_KV.shape[-1])
            text = branches[number].text.fork()
            made = make_token(number, token, text)
            if made.finish is not None:
                if order < self.width:  # the K after them only replace beams that end here
                    tokens = [*branches[number].tokens, made]
                    self.finished.append((self._score(score, len(tokens)), tokens))
            elif len(grown) < self.width:
                grown.append((number, made, text))
        self.finished = sorted(self.finished, key=lambda found: found[0], reverse=True)[: self.width]
        if len(self.finished) >= self.width and grown:
            number, made, _ = grown[0]
            ahead = self._score(branches[number].log_prob + made.log_prob, len(branches[number].tokens) + 1)
            grown = [] if self.finished[-1][0] >= ahead else grown
        return self._continued(branches, grown)

    def _continued(
        self, branches: list[Branch], grown: list[tuple[int, Token, AnswerText]]
    ) -> tuple[list[Branch], list[Branch]]:
        """The first child of a hypothesis keeps its session; further ones take over those of hypotheses that end."""
        kept: dict[int, Branch] = {}
        chosen: list[Branch] = []
        for number, _, _ in grown:  # all forks before any branch grows
            chosen.append(branches[number].fork() if number in kept else kept.setdefault(number, branches[number]))
        for branch, (_, token, text) in zip(chosen, grown, strict=True):
            branch.text = text
            branch.append(token)
        ended = [branch for number, branch in enumerate(branches) if number not in kept]
        for fork in [branch for branch in chosen if not branch.sent]:
            if ended:
                fork.take_over(ended.pop())
        return chosen, ended

    def _score(self, log_prob: float, tokens: int) -> float:
        return log_prob / tokens**self.penalty
