"""Generates with Gradual Unrolling over any `ContextSource`. Knows no Ray. B sequences, K beams, V tokens, H hidden.

The PLM owner sees token ids only; both distributions and their mixture are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from pema_ray.data_owner.experts import Expert
from pema_ray.data_owner.reading import Reading
from pema_ray.data_owner.unrolling import UnrollingSchedule, mix
from pema_ray.line import ContextSource, DecodingSession, ExtractBatch, LMHead


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is chosen."""

    kind: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 4
    length_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to be generated.

    Attributes:
        length: what a falling schedule of λ is stretched over, in steps.
        schedule: this sequence's own λ.
    """

    prompt: list[int]
    max_new_tokens: int
    schedule: UnrollingSchedule
    length: int = 1


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """How one token was decided: λ_t and log-probability under both distributions."""

    token: int
    lam: float
    log_pema: float
    log_plm: float


@dataclass
class Generated:
    """An answer without its EOS or stop string.

    Attributes:
        tokens: everything generated, EOS included.
        finish: `eos`, `stop` or `length`.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["eos", "stop", "length"] = "length"
    log_prob: float = 0.0
    trace: list[TokenTrace] = field(default_factory=list)


class Generator:
    """Decodes batches of requests.

    Args:
        source: the PLM owner.
        head: its LM head.
        expert: what is mixed with the PLM, such as an adapter; None generates with the PLM alone.
        detokenize: token ids → text.
        eos: ids that end an answer.
        stop: strings that end an answer.
    """

    def __init__(
        self,
        source: ContextSource,
        head: LMHead,
        expert: Expert | None,
        detokenize: Callable[[Sequence[int]], str],
        eos: Sequence[int],
        stop: Sequence[str] = (),
    ) -> None:
        self.source, self.head, self.expert = source, head, expert
        self.detokenize, self.eos, self.stop = detokenize, frozenset(eos), tuple(stop)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        explain: bool = False,
        streams: Sequence[int] | None = None,
    ) -> list[Generated]:
        """One answer per request, in their order.

        Args:
            explain: keep for every token λ_t and both probabilities.
            streams: numbers that, with the seed, name each request's random draws, so that a sampled answer does
                not depend on the batch it is drawn in; their places by default.
        """
        if decoding.kind == "beam":
            answers = self._beam(requests, decoding)
            if explain:
                self._trace(requests, answers)
            return answers
        return self._step_by_step(requests, decoding, explain, range(len(requests)) if streams is None else streams)

    # ── distributions ───────────────────────────────────────────────────────

    def _begin(self, prompts: Sequence[Sequence[int]]) -> Reading | None:
        return None if self.expert is None else self.expert.begin(self.source, prompts, self.head)

    def _distributions(self, reading: Reading | None, state_BH: torch.Tensor, lam_B: torch.Tensor, both: bool):
        """`(log P, log P_PEMA or None, log P_LM or None)`, each `[B, V]`; what λ = 0 or 1 does not need is left out."""
        device = self.head.weight.device
        state = state_BH.to(device)
        use_plm = both or reading is None or bool((lam_B < 1).any())
        use_pema = both or bool((lam_B > 0).any())  # λ never rises: who is not asked now is not asked again
        log_pema = reading.log_probs(state) if use_pema and reading is not None else None
        log_plm = self.head.log_probs(self.head.norm(state)) if use_plm else None
        if log_pema is None or log_plm is None:
            only = log_plm if log_pema is None else log_pema
            assert only is not None
            return only, log_pema, log_plm
        return mix(log_pema, log_plm, lam_B), log_pema, log_plm

    def _lambda(self, requests: Sequence[Request], step: int) -> torch.Tensor:
        if self.expert is None:
            return torch.zeros(len(requests))
        return torch.tensor([r.schedule.at(step, r.length) for r in requests])

    # ── greedy and sampling ─────────────────────────────────────────────────

    def _step_by_step(
        self, requests: Sequence[Request], decoding: Decoding, explain: bool, streams: Sequence[int]
    ) -> list[Generated]:
        answers = [Generated() for _ in requests]
        draw = [random_stream(decoding.seed, stream) for stream in streams]
        alive = list(range(len(requests)))
        reading = self._begin([request.prompt for request in requests])
        session = DecodingSession(self.source, [request.prompt for request in requests])
        try:
            for step in range(max(request.max_new_tokens for request in requests)):
                lam = self._lambda([requests[i] for i in alive], step)
                log_p, log_pema, log_plm = self._distributions(reading, session.state_BH, lam, both=explain)
                chosen = choose(log_p, decoding, [draw[i] for i in alive])
                kept: list[int] = []
                for row, (i, token) in enumerate(zip(alive, chosen, strict=True)):
                    answer = answers[i]
                    answer.tokens.append(token)
                    answer.log_prob += float(log_p[row, token])
                    if explain and log_plm is not None:
                        pema = log_plm if log_pema is None else log_pema
                        trace = TokenTrace(token, float(lam[row]), float(pema[row, token]), float(log_plm[row, token]))
                        answer.trace.append(trace)
                    if not self._finish(answer, requests[i].max_new_tokens):
                        kept.append(row)
                if not kept:
                    break
                tokens = [chosen[row] for row in kept]
                session.extend(kept, tokens)
                if reading is not None:
                    reading.follow(kept, tokens)
                alive = [alive[row] for row in kept]
        finally:
            session.close()
        return answers

    def _finish(self, answer: Generated, max_new_tokens: int) -> bool:
        """Whether the answer is complete; sets its text and reason if so."""
        if answer.tokens[-1] in self.eos:
            answer.finish, answer.text = "eos", self.detokenize(answer.tokens[:-1])
            return True
        if self.stop:
            text = self.detokenize(answer.tokens)
            kept = _cut(text, self.stop)
            if len(kept) < len(text):
                answer.finish, answer.text = "stop", kept
                return True
        if len(answer.tokens) >= max_new_tokens:
            answer.finish, answer.text = "length", self.detokenize(answer.tokens)
            return True
        return False

    # ── beam search ─────────────────────────────────────────────────────────

    def _beam(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """K beams of every request, all in one session; their rows lie together, request by request."""
        searches = [_BeamSearch(request, decoding) for request in requests]
        alive = searches
        reading = self._begin([request.prompt for request in requests])
        session = DecodingSession(self.source, [request.prompt for request in requests])
        try:
            for step in range(max(request.max_new_tokens for request in requests)):
                lam = self._lambda([search.request for search in alive for _ in search.beams], step)
                log_p, _, _ = self._distributions(reading, session.state_BH, lam, both=False)
                rows, tokens, first = [], [], 0
                for search in alive:
                    held = len(search.beams)
                    grown = search.advance(log_p[first : first + held], self._finish)
                    rows += [first + row for row in grown]
                    tokens += [beam.tokens[-1] for beam in search.beams]
                    first += held
                alive = [search for search in alive if search.beams]
                if not alive:
                    break
                session.extend(rows, tokens)
                if reading is not None:
                    reading.follow(rows, tokens)
        finally:
            session.close()
        return [search.finished[0][1] for search in searches]

    def _trace(self, requests: Sequence[Request], answers: Sequence[Generated]) -> None:
        """Explain finished answers by one teacher-forced pass; beams that were given up are not asked about."""
        batch = ExtractBatch(
            [[*r.prompt, *a.tokens[:-1]] for r, a in zip(requests, answers, strict=True)],
            [len(request.prompt) - 1 for request in requests],
        )
        states = self.source.extract(batch).split([len(answer.tokens) for answer in answers])
        reading = self._begin([request.prompt for request in requests])
        alive = list(range(len(requests)))
        for step in range(max(len(answer.tokens) for answer in answers)):
            lam = self._lambda([requests[i] for i in alive], step)
            state = torch.stack([states[i][step] for i in alive])
            _, log_pema, log_plm = self._distributions(reading, state, lam, both=True)
            assert log_plm is not None
            pema = log_plm if log_pema is None else log_pema
            tokens = [answers[i].tokens[step] for i in alive]
            for row, (i, token) in enumerate(zip(alive, tokens, strict=True)):
                trace = TokenTrace(token, float(lam[row]), float(pema[row, token]), float(log_plm[row, token]))
                answers[i].trace.append(trace)
            kept = [row for row, i in enumerate(alive) if len(answers[i].tokens) > step + 1]
            if kept and reading is not None:
                reading.follow(kept, [tokens[row] for row in kept])
            alive = [alive[row] for row in kept]


class _BeamSearch:
    """The K beams of one request; scores are log P / length^penalty."""

    def __init__(self, request: Request, decoding: Decoding) -> None:
        self.request, self.width, self.penalty = request, decoding.beams, decoding.length_penalty
        self.beams = [Generated()]
        self.finished: list[tuple[float, Generated]] = []

    def advance(self, log_p_KV: torch.Tensor, finish: Callable[[Generated, int], bool]) -> list[int]:
        """Grow every beam by a token; says which old beam each new one continues. None are left when it is over."""
        held = torch.tensor([[beam.log_prob] for beam in self.beams], device=log_p_KV.device)
        total = (log_p_KV + held).flatten()
        best, place = total.topk(min(2 * self.width, total.numel()))
        rows: list[int] = []
        grown: list[Generated] = []
        for order, (score, flat) in enumerate(zip(best.tolist(), place.tolist(), strict=True)):
            row, token = divmod(flat, log_p_KV.shape[-1])
            beam = Generated([*self.beams[row].tokens, token], log_prob=score)
            if finish(beam, self.request.max_new_tokens):
                if order < self.width:  # the K after them only stand in for beams that end here
                    self.finished.append((self._score(score, len(beam.tokens)), beam))
            elif len(grown) < self.width:
                rows.append(row)
                grown.append(beam)
        self.finished = sorted(self.finished, key=lambda found: found[0], reverse=True)[: self.width]
        if len(self.finished) >= self.width and grown:
            hopeless = self.finished[-1][0] >= self._score(grown[0].log_prob, len(grown[0].tokens))
            grown, rows = ([], []) if hopeless else (grown, rows)
        self.beams = grown
        return rows

    def _score(self, log_prob: float, tokens: int) -> float:
        return log_prob / tokens**self.penalty


def choose(log_p_BV: torch.Tensor, decoding: Decoding, draw: Sequence[torch.Generator]) -> list[int]:
    """The next token of every row: the most probable one, or drawn by temperature and from the nucleus `top_p`."""
    if decoding.kind == "greedy":
        return log_p_BV.argmax(-1).tolist()
    scaled = (log_p_BV / decoding.temperature).softmax(-1)
    if decoding.top_p < 1:
        ordered, place = scaled.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0  # the first token past the mass stays
        scaled = torch.zeros_like(scaled).scatter(-1, place, ordered)
    rows = zip(scaled.cpu(), draw, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


def random_stream(seed: int, stream: int) -> torch.Generator:
    """Random draws of one sequence, named by a seed and a number."""
    mixed = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string that follows something other than white space."""
    begin = len(text) - len(text.lstrip("\n "))
    ends = [at for s in stops if (at := text.find(s, begin)) >= 0]
    return text[: min(ends)] if ends else text
