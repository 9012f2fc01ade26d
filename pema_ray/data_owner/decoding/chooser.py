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

_MOST_ROWS = 128  # of one product with the LM head


class _Distributions:
    """Of N rows: the mixture, and its two parts where they were needed.

    What a greedy answer needs of every row comes to the host in one copy: a device is waited for once a step.

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
            place = next(n for n, known in enumerate(self._parts) if known is part)
            return self._best_log_probs[place][row]
        return float(part[row, token])


class Chooser:
    """Chooses tokens.

    Args:
        head: the PLM's LM head, on the device where distributions are computed.
        eos: tokens that end an answer.

    Attributes:
        longest_plm_draft: tokens that the PLM owner may be asked to draft at a time.
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
        """The next tokens of every answer; an answer's own error stands in its place.

        A greedy or sampled answer gets as many tokens as its draft had accepted, and one more. Beam search gives its
        tokens when it is over. Branches are ready for their next step afterwards.
        """
        chosen: list[list[Token] | Exception] = []
        part: list[Generation] = []
        rows = 0
        for generation in batch:
            count = sum(len(_states(branch)) for branch in generation.branches)
            if part and rows + count > _MOST_ROWS:
                chosen += self._choose_together(part)
                part, rows = [], 0
            part.append(generation)
            rows += count
        chosen += self._choose_together(part)
        self._draft(
            [g for g, c in zip(batch, chosen, strict=True) if isinstance(c, list) and c and c[-1].finish is None]
        )
        return chosen

    def _take_in_prompts(self, batch: Sequence[Generation]) -> None:
        """Adapters that look back read the prompts of answers that begin."""
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
            self._take_in_prompts(batch)
            rows = [(g, branch, i) for g in batch for branch in g.branches for i in range(len(_states(branch)))]
            state_NH = torch.cat([_states(branch) for g in batch for branch in g.branches])
            found = self._distributions(rows, state_NH.to(self.head.weight.device))
        except Exception as error:  # of one predictor: answers that do not use it continue
            return [error] if len(batch) == 1 else [self._choose_together([one])[0] for one in batch]
        chosen: list[list[Token] | Exception] = []
        begin = 0
        for generation in batch:
            branches = generation.branches
            try:
                follow = self._follow if generation.beams is None else self._grow_beams
                chosen.append(follow(generation, found, begin))
            except Exception as error:  # this answer's own fault
                chosen.append(error)
            begin += sum(len(_states(branch)) for branch in branches)
            for branch in [*branches, *generation.branches]:
                branch.state_NH = None
        return chosen

    def _distributions(self, rows: Sequence[tuple[Generation, Branch, int]], state_NH: torch.Tensor) -> _Distributions:
        schedule = [
            0.0 if g.predictor is None else g.request.schedule.at(branch.position + i, g.request.length)
            for g, branch, i in rows
        ]
        explain = [g.request.explain for g, _, _ in rows]
        wanted = [own or lam > 0 for own, lam in zip(explain, schedule, strict=True)]
        # A predicted λ is known on the device alone: the PLM's part is computed whatever it is.
        needs_plm = [
            own or lam < 1 or (g.predictor is not None and g.predictor.predicts_lambda)
            for own, lam, (g, _, _) in zip(explain, schedule, rows, strict=True)
        ]
        schedule_N = torch.tensor(schedule, device=state_NH.device)
        predictors = {g.predictor for g, _, _ in rows}
        log_plm_NV = None
        if len(predictors) == 1 and None not in predictors and all(wanted) and all(needs_plm):
            (predictor,) = predictors
            assert predictor is not None
            log_own_NV, share_N, log_plm_NV = predictor.both(state_NH, [branch.decoding for _, branch, _ in rows])
            lam_N = schedule_N * share_N
        else:
            log_own_NV, lam_N = self._own(rows, state_NH, schedule_N, wanted)
            if log_own_NV is None or any(needs_plm):
                log_plm_NV = self.head.log_probs(self.head.norm(state_NH))
        if log_own_NV is None or log_plm_NV is None:
            log_p_NV = log_plm_NV if log_own_NV is None else log_own_NV
            assert log_p_NV is not None
        else:
            log_p_NV = mix(log_own_NV, log_plm_NV, lam_N)
        return _Distributions(log_p_NV, log_own_NV, log_plm_NV, lam_N)

    def _own(
        self,
        rows: Sequence[tuple[Generation, Branch, int]],
        state_NH: torch.Tensor,
        schedule_N: torch.Tensor,
        wanted: Sequence[bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`(log P_own [N, V] or None where nobody needs it, λ [N])`; zeros in rows that do not need it."""
        groups: dict[Predictor, list[int]] = {}
        for row, ((generation, _, _), is_wanted) in enumerate(zip(rows, wanted, strict=True)):
            if is_wanted and generation.predictor is not None:
                groups.setdefault(generation.predictor, []).append(row)
        if not groups:
            return None, schedule_N
        log_own_NV, lam_N = None, schedule_N.clone()
        for predictor, chosen in groups.items():
            decoding = [rows[row][1].decoding for row in chosen]
            if len(chosen) == len(rows):
                log_own_NV, share_N = predictor.distribution(state_NH, decoding)
                return log_own_NV, lam_N * share_N
            if log_own_NV is None:
                log_own_NV = torch.zeros(len(rows), self.head.vocab_size, device=state_NH.device)
            place = torch.tensor(chosen, device=state_NH.device)
            log_own_NV[place], share_N = predictor.distribution(state_NH[place], decoding)
            lam_N[place] *= share_N
        return log_own_NV, lam_N

    # ── tokens ──────────────────────────────────────────────────────────────

    def _follow(self, generation: Generation, found: _Distributions, begin: int) -> list[Token]:
        """Tokens of a greedy or sampled answer, as long as its draft is right."""
        request, (branch,) = generation.request, generation.branches
        tokens: list[Token] = []
        draft = branch.draft_tokens
        for row in range(begin, begin + len(_states(branch))):
            if request.sampling.kind == "greedy":
                chosen = found.best[row]
            else:
                chosen = draw(found.log_p_NV[row], request.sampling, generation.rng)
            tokens.append(self._token(generation, found, row, chosen, branch.text, branch.position))
            branch.append(tokens[-1])
            if generation.predictor is not None:
                self.metrics.observe("lambda", found.lam[row])
            if generation.lookup is not None:
                generation.lookup.follow(chosen)
            place = row - begin
            if tokens[-1].finish is not None or place >= len(draft) or draft[place] != chosen:
                break
        accepted = len(tokens) - 1
        self.counts.update({"tokens": len(tokens), "drafted": len(draft), "accepted": accepted})
        branch.sent += accepted
        if tokens[-1].finish is None or accepted == len(draft):  # else nobody knows how far it was right
            self.draft_length.record_acceptance(branch.draft.kind, len(draft), accepted)
        branch.draft, branch.draft_tokens = Draft(), []
        return tokens

    def _grow_beams(self, generation: Generation, found: _Distributions, begin: int) -> list[Token]:
        """All tokens of the best hypothesis when the search is over; nothing before."""
        search, branches = generation.beams, generation.branches
        assert search is not None
        position = branches[0].position

        def make_token(number: int, token: int, text: AnswerText) -> Token:
            return self._token(generation, found, begin + number, token, text, position)

        log_p_KV = found.log_p_NV[begin : begin + len(branches)]
        generation.branches, ended = search.advance(branches, log_p_KV, make_token)
        generation.ended += [branch.session for branch in ended]
        self.counts["tokens"] += len(generation.branches)
        return [] if generation.branches else search.finished[0][1]

    def _token(
        self, generation: Generation, found: _Distributions, row: int, token: int, text: AnswerText, position: int
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
        attribution = _attribution(generation, found, row, token) if request.explain else None
        top = top_tokens(found.log_p_NV[row], request.top)
        return Token(token, piece, found.log_prob(row, token), finish, top, attribution)

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


def _attribution(generation: Generation, found: _Distributions, row: int, token: int) -> Attribution:
    assert found.log_plm_NV is not None, "both distributions are computed for answers that explain"
    plm_V, top = found.log_plm_NV[row], generation.request.top
    alone = generation.predictor is None or found.log_own_NV is None
    own_V = plm_V if alone else found.log_own_NV[row]  # type: ignore[index]
    tops = top_tokens(own_V, top), top_tokens(plm_V, top)
    own = found.log_plm_NV if alone else found.log_own_NV
    probabilities = found.log_prob(row, token, own), found.log_prob(row, token, found.log_plm_NV)
    return Attribution(found.lam[row], *probabilities, *tops)


def _states(branch: Branch) -> torch.Tensor:
    assert branch.state_NH is not None, "a branch is chosen for once its representations have arrived"
    return branch.state_NH
