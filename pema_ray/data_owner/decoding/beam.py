"""Beam search over the mixture: K hypotheses, ranked by log P / length^penalty. K beams, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pema_ray.data_owner.decoding.branch import Branch
from pema_ray.data_owner.decoding.request import SamplingParams, Token
from pema_ray.data_owner.decoding.text import AnswerText

# (branch number, token id, text so far) -> the token that extends this hypothesis
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
        """Extend every hypothesis by a token.

        Returns:
            The branches that continue (none when the search is over), and those that end here.
        """
        log_prob_K1 = torch.tensor([[branch.log_prob] for branch in branches], device=log_p_KV.device)
        total_KV = (log_p_KV + log_prob_K1).flatten()
        scores, places = total_KV.topk(min(2 * self.width, total_KV.numel()))
        children: list[tuple[int, Token, AnswerText]] = []
        for rank, (score, flat) in enumerate(zip(scores.tolist(), places.tolist(), strict=True)):
            number, token = divmod(flat, log_p_KV.shape[-1])
            text = branches[number].text.fork()
            child = make_token(number, token, text)
            if child.finish is not None:
                if rank < self.width:  # lower ranks only replace beams that end
                    tokens = [*branches[number].tokens, child]
                    self.finished.append((self._score(score, len(tokens)), tokens))
            elif len(children) < self.width:
                children.append((number, child, text))
        self.finished = sorted(self.finished, key=lambda scored: scored[0], reverse=True)[: self.width]
        if len(self.finished) >= self.width and children:
            number, child, _ = children[0]
            best_open = self._score(branches[number].log_prob + child.log_prob, len(branches[number].tokens) + 1)
            children = [] if self.finished[-1][0] >= best_open else children
        return self._continued(branches, children)

    def _continued(
        self, branches: list[Branch], children: list[tuple[int, Token, AnswerText]]
    ) -> tuple[list[Branch], list[Branch]]:
        """The first child of a hypothesis keeps its session; the others take sessions of ended hypotheses."""
        reused: dict[int, Branch] = {}
        continuing: list[Branch] = []
        for number, _, _ in children:  # all forks before any branch grows
            branch = branches[number]
            continuing.append(branch.fork() if number in reused else reused.setdefault(number, branch))
        for branch, (_, token, text) in zip(continuing, children, strict=True):
            branch.text = text
            branch.append(token)
        ended = [branch for number, branch in enumerate(branches) if number not in reused]
        for fork in [branch for branch in continuing if not branch.sent]:
            if ended:
                fork.take_over(ended.pop())
        return continuing, ended

    def _score(self, log_prob: float, tokens: int) -> float:
        return log_prob / tokens**self.penalty
