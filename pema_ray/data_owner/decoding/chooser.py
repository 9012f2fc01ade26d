"""Chooses next tokens for all answers whose representations have arrived: Gradual Unrolling (paper section 3.4).

Runs in the decoder's own thread and knows no sessions, no network and no event loop. Rows of all answers share one
product with the LM head. N rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pema_ray.data_owner.decoding.branch import Branch
from pema_ray.data_owner.decoding.draft_length import Draft, DraftLengthController
from pema_ray.data_owner.decoding.drafts import LONGEST_MATCH
from pema_ray.data_owner.decoding.generation import Generation
from pema_ray.data_owner.decoding.predictor import Predictor
from pema_ray.data_owner.decoding.request import Attribution, Finish, Token
from pema_ray.data_owner.decoding.sampling import draw, top_tokens
from pema_ray.data_owner.decoding.text import AnswerText
from pema_ray.data_owner.decoding.unrolling import mix
from pema_ray.line import LMHead
from pema_ray.runtime.metrics import Metrics, NoMetrics

_MAX_ROWS = 128  # of one product with the LM head


class _Distributions:
    """Of N rows: the mixture, and its two parts where they were needed.

    One copy per step brings what greedy answers need of every row to the host.

    Attributes:
        lam: λ of every row.
        best: the likeliest token of every row.
    """

    def __init__(
        self,
        log_p_NV: torch.Tensor,
        log_own_NV: torch.Tensor | None,
        log_plm_NV: torch.Tensor | None,
        lam_N: torch.Tensor,
    ) -> None:
        self.log_p_NV, self.log_own_NV, self.log_plm_NV = log_p_NV, log_own_NV, log_plm_NV
        self._parts = [part for part in (log_p_NV, log_own_NV, log_plm_NV) if part is not None]
        best_N1 = log_p_NV.argmax(-1, keepdim=True)
        columns = [best_N1[:, 0], lam_N, *(part.gather(1, best_N1)[:, 0] for part in self._parts)]
        best, self.lam, *self._best_log_probs = torch.stack([column.double() for column in columns]).tolist()
        self.best = [int(token) for token in best]

    def log_prob(self, row: int, token: int, part: torch.Tensor | None = None) -> float:
        """Of a token in the mixture, or in one of its parts."""
        part = self.log_p_NV if part is None else part
        if token == self.best[row]:
            place = next(n for n, candidate in enumerate(self._parts) if candidate is part)
            return self._best_log_probs[place][row]
        return float(part[row, token])


class Chooser:
    """Chooses tokens.

    Args:
        head: the PLM's LM head, on the device where distributions are computed.
        eos: tokens that end an answer.

    Attributes:
        longest_plm_draft: maximum tokens that the PLM owner drafts at a time.
        draft_length: decides how much to draft.
    """

    def __init__(self, head: LMHead, eos: Sequence[int]) -> None:
        self.head, self._eos = head, frozenset(eos)
        self.longest_plm_draft = 0
        self.draft_length = DraftLengthController()
        self.metrics: Metrics = NoMetrics()
        self.counts: Counter[str] = Counter()

    @torch.inference_mode()
    def choose(self, batch: Sequence[Generation]) -> list[list[Token] | Exception]:
        """The next tokens of every answer, or the error that ends it.

        A greedy or sampled answer gets its accepted draft tokens and one more. Beam search returns its tokens when it
        is over. Branches are ready for their next step afterwards.
        """
        results: list[list[Token] | Exception] = []
        part: list[Generation] = []
        rows = 0
        for generation in batch:
            count = sum(len(_states(branch)) for branch in generation.branches)
            if part and rows + count > _MAX_ROWS:
                results += self._choose_together(part)
                part, rows = [], 0
            part.append(generation)
            rows += count
        results += self._choose_together(part)
        self._draft(
            [g for g, c in zip(batch, results, strict=True) if isinstance(c, list) and c and c[-1].finish is None]
        )
        return results

    def _begin_decoding(self, batch: Sequence[Generation]) -> None:
        """Read the prompts of new answers into the decoding states of adapters that look back."""
        for generation in batch:
            if generation.prompt_from is None:
                continue
            assert generation.predictor is not None
            for branch in generation.branches:
                if branch.decoding is None:
                    states = _states(branch)
                    branch.decoding = generation.predictor.begin(states, branch.ids)
                    branch.state_NH = states[-1:]

    # ── distributions ───────────────────────────────────────────────────────

    def _choose_together(self, batch: Sequence[Generation]) -> list[list[Token] | Exception]:
        try:
            self._begin_decoding(batch)
            rows = [(g, branch, i) for g in batch for branch in g.branches for i in range(len(_states(branch)))]
            state_NH = torch.cat([_states(branch) for g in batch for branch in g.branches])
            distributions = self._distributions(rows, state_NH.to(self.head.weight.device))
        except Exception as error:  # of one predictor: answers of the others continue
            return [error] if len(batch) == 1 else [self._choose_together([generation])[0] for generation in batch]
        results: list[list[Token] | Exception] = []
        begin = 0
        for generation in batch:
            branches = generation.branches
            try:
                advance = self._advance_single if generation.beams is None else self._advance_beams
                results.append(advance(generation, distributions, begin))
            except Exception as error:  # ends this answer alone
                results.append(error)
            begin += sum(len(_states(branch)) for branch in branches)
            for branch in [*branches, *generation.branches]:
                branch.state_NH = None
        return results

    def _distributions(self, rows: Sequence[tuple[Generation, Branch, int]], state_NH: torch.Tensor) -> _Distributions:
        schedule = [
            0.0 if g.predictor is None else g.request.schedule.at(branch.position + i, g.request.length)
            for g, branch, i in rows
        ]
        explain = [g.request.explain for g, _, _ in rows]
        needs_own = [explains or lam > 0 for explains, lam in zip(explain, schedule, strict=True)]
        # The PLM's part is always computed for a predicted λ, whose value stays on the device.
        needs_plm = [
            explains or lam < 1 or (g.predictor is not None and g.predictor.predicts_lambda)
            for explains, lam, (g, _, _) in zip(explain, schedule, rows, strict=True)
        ]
        schedule_N = torch.tensor(schedule, device=state_NH.device)
        predictors = {g.predictor for g, _, _ in rows}
        log_plm_NV = None
        if len(predictors) == 1 and None not in predictors and all(needs_own) and all(needs_plm):
            (predictor,) = predictors
            assert predictor is not None
            log_own_NV, share_N, log_plm_NV = predictor.both(state_NH, [branch.decoding for _, branch, _ in rows])
            lam_N = schedule_N * share_N
        else:
            log_own_NV, lam_N = self._own_log_probs(rows, state_NH, schedule_N, needs_own)
            if log_own_NV is None or any(needs_plm):
                log_plm_NV = self.head.log_probs(self.head.norm(state_NH))
        if log_own_NV is None or log_plm_NV is None:
            log_p_NV = log_plm_NV if log_own_NV is None else log_own_NV
            assert log_p_NV is not None
        else:
            log_p_NV = mix(log_own_NV, log_plm_NV, lam_N)
        return _Distributions(log_p_NV, log_own_NV, log_plm_NV, lam_N)

    def _own_log_probs(
        self,
        rows: Sequence[tuple[Generation, Branch, int]],
        state_NH: torch.Tensor,
        schedule_N: torch.Tensor,
        needs_own: Sequence[bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`(log P_own [N, V], λ [N])`; zeros in rows that do not need it, None if none does."""
        groups: dict[Predictor, list[int]] = {}
        for row, ((generation, _, _), is_needed) in enumerate(zip(rows, needs_own, strict=True)):
            if is_needed and generation.predictor is not None:
                groups.setdefault(generation.predictor, []).append(row)
        if not groups:
            return None, schedule_N
        log_own_NV, lam_N = None, schedule_N.clone()
        for predictor, group in groups.items():
            decoding = [rows[row][1].decoding for row in group]
            if len(group) == len(rows):
                log_own_NV, share_N = predictor.distribution(state_NH, decoding)
                return log_own_NV, lam_N * share_N
            if log_own_NV is None:
                log_own_NV = torch.zeros(len(rows), self.head.vocab_size, device=state_NH.device)
            index = torch.tensor(group, device=state_NH.device)
            log_own_NV[index], share_N = predictor.distribution(state_NH[index], decoding)
            lam_N[index] *= share_N
        return log_own_NV, lam_N

    # ── tokens ──────────────────────────────────────────────────────────────

    def _advance_single(self, generation: Generation, distributions: _Distributions, begin: int) -> list[Token]:
        """Tokens of a greedy or sampled answer: the accepted part of its draft, and one more."""
        request, (branch,) = generation.request, generation.branches
        tokens: list[Token] = []
        draft = branch.draft_tokens
        for row in range(begin, begin + len(_states(branch))):
            if request.sampling.kind == "greedy":
                token = distributions.best[row]
            else:
                token = draw(distributions.log_p_NV[row], request.sampling, generation.rng)
            tokens.append(self._token(generation, distributions, row, token, branch.text, branch.position))
            branch.append(tokens[-1])
            if generation.predictor is not None:
                self.metrics.observe("lambda", distributions.lam[row])
            if generation.lookup is not None:
                generation.lookup.follow(token)
            place = row - begin
            if tokens[-1].finish is not None or place >= len(draft) or draft[place] != token:
                break
        accepted = len(tokens) - 1
        self.counts.update({"tokens": len(tokens), "drafted": len(draft), "accepted": accepted})
        branch.sent += accepted
        if tokens[-1].finish is None or accepted == len(draft):  # else the rest of the draft was never verified
            self.draft_length.record_acceptance(branch.draft.kind, len(draft), accepted)
        branch.draft, branch.draft_tokens = Draft(), []
        return tokens

    def _advance_beams(self, generation: Generation, distributions: _Distributions, begin: int) -> list[Token]:
        """All tokens of the best hypothesis when the search is over; nothing before."""
        search, branches = generation.beams, generation.branches
        assert search is not None
        position = branches[0].position

        def make_token(number: int, token: int, text: AnswerText) -> Token:
            return self._token(generation, distributions, begin + number, token, text, position)

        log_p_KV = distributions.log_p_NV[begin : begin + len(branches)]
        generation.branches, ended = search.advance(branches, log_p_KV, make_token)
        generation.ended += [branch.session for branch in ended]
        self.counts["tokens"] += len(generation.branches)
        return [] if generation.branches else search.finished[0][1]

    def _token(
        self,
        generation: Generation,
        distributions: _Distributions,
        row: int,
        token: int,
        text: AnswerText,
        position: int,
    ) -> Token:
        request = generation.request
        ends = token in self._eos or token in request.eos
        piece = "" if ends else text.push(token)
        finish: Finish | None = None
        if ends:
            finish = "eos"
        elif text.stopped:
            finish = "stop"
        elif position + 1 >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            piece += text.finish()
        attribution = _attribution(generation, distributions, row, token) if request.explain else None
        top = top_tokens(distributions.log_p_NV[row], request.top)
        return Token(token, piece, distributions.log_prob(row, token), finish, top, attribution)

    # ── drafts ──────────────────────────────────────────────────────────────

    def _draft(self, continuing: Sequence[Generation]) -> None:
        """Decide what every answer drafts next."""
        offers = []
        for generation in continuing:
            request, (branch,) = generation.request, generation.branches
            limit = min(request.draft, request.max_new_tokens - branch.position - 1)
            if generation.lookup is None or limit < 1:
                offers.append(([], 0, 0))
                continue
            candidates = generation.lookup.candidates(limit)
            if generation.memory is not None:
                answer = branch.ids[branch.prompt_length :]
                candidates += generation.memory.candidates(answer[-LONGEST_MATCH:], limit)
            offers.append((candidates, limit, min(limit, self.longest_plm_draft)))
        if any(limit for _, limit, _ in offers):
            for generation, draft in zip(continuing, self.draft_length.choose(offers), strict=True):
                (branch,) = generation.branches
                branch.draft, branch.draft_tokens = draft, list(draft.tokens)


def _attribution(generation: Generation, distributions: _Distributions, row: int, token: int) -> Attribution:
    log_own_NV, log_plm_NV = distributions.log_own_NV, distributions.log_plm_NV
    assert log_plm_NV is not None, "both distributions are computed for answers that explain"
    if generation.predictor is None or log_own_NV is None:
        log_own_NV = log_plm_NV
    own, plm = (distributions.log_prob(row, token, part) for part in (log_own_NV, log_plm_NV))
    top_own, top_plm = (top_tokens(part[row], generation.request.top) for part in (log_own_NV, log_plm_NV))
    return Attribution(distributions.lam[row], own, plm, top_own, top_plm)


def _states(branch: Branch) -> torch.Tensor:
    assert branch.state_NH is not None, "its representations have arrived"
    return branch.state_NH
