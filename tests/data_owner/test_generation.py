"""Generation is the PLM's own at λ = 0, the adapter's at λ = 1, and the same for a sequence in any company."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from pema_ray.data_owner import AdapterConfig, PemaAdapter, UnrollingSchedule, mix
from pema_ray.data_owner.generation import Decoding, Generated, Generator, Request
from pema_ray.line import ExtractBatch
from pema_ray.plm_owner import InProcessPLM

THREE = pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
PROMPTS = [[0, 40, 77, 120, 9], [0, 200, 31], [0, 61, 62, 63, 64, 65, 66, 67, 68], [0, 5]]
STEPS = 14


def adapter_for(source: InProcessPLM, seed: int = 0) -> PemaAdapter:
    """A random adapter whose opinions are as firm as the PLM's and quite other."""
    card = source.describe()
    torch.manual_seed(seed)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, 8, card.name, card.fingerprint))
    torch.nn.init.orthogonal_(adapter.A)
    torch.nn.init.normal_(adapter.B_pd, std=0.7)
    return adapter.eval()


def generator(
    source: InProcessPLM, adapter: bool = True, eos: Sequence[int] = (1,), stop: Sequence[str] = ()
) -> Generator:
    bundle = source.lm_head()
    text = lambda ids: source.plm.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    return Generator(source, bundle.head, adapter_for(source) if adapter else None, text, eos, stop)


def requests(lam: float = 0.5, prompts: Sequence[list[int]] = PROMPTS, steps: int = STEPS) -> list[Request]:
    return [Request(prompt, steps, UnrollingSchedule(lam)) for prompt in prompts]


def various() -> list[Request]:
    """A schedule, a length and a limit of its own for every prompt."""
    schedules = [
        UnrollingSchedule(0.9, "quadratic"),
        UnrollingSchedule(0.6, "linear", 0.1),
        UnrollingSchedule(0.4),
        UnrollingSchedule(0.9, "quadratic", 0.25),
    ]
    triples = zip(PROMPTS, schedules, (5, 9, 1, 3), (7, 14, 11, 1), strict=True)
    return [Request(prompt, steps, schedule, length) for prompt, schedule, length, steps in triples]


def own_generate(source: InProcessPLM, eos: int = 1, **options) -> list[list[int]]:
    """What transformers' `generate` answers to the prompts, left-padded, up to and with EOS."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": eos, "pad_token_id": 2, **options}
    rows = source.plm.model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def distributions(source: InProcessPLM, adapter: PemaAdapter, ids: list[int], first: int = -1):
    """`(log P_PEMA, log P_LM)` `[n, V]` from position `first` on, by one pass without a session."""
    head, first = source.lm_head().head, first % len(ids)
    state = source.extract(ExtractBatch([ids], [first]))
    return adapter.log_probs(state, head).detach(), head.log_probs(head.norm(state))


# ── λ = 0 and λ = 1 ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("adapter", [False, True], ids=["no adapter", "adapter at λ=0"])
@THREE
def test_lambda_0_is_the_plms_own_greedy_answer_token_for_token(tiny_source, name: str, adapter: bool):
    source = tiny_source(name)
    expected = own_generate(source)
    answers = generator(source, adapter).generate(requests(0.0), Decoding())
    assert [answer.tokens for answer in answers] == expected
    eos = expected[0][STEPS // 2]  # a token that does come: now it ends answers
    expected = own_generate(source, eos)
    answers = generator(source, adapter, eos=[eos]).generate(requests(0.0), Decoding())
    assert [answer.tokens for answer in answers] == expected
    assert answers[0].finish == "eos" and len(answers[0].tokens) <= STEPS // 2 + 1


@THREE
def test_lambda_1_is_the_adapters_greedy_answer(tiny_source, name: str):
    source = tiny_source(name)
    adapter = adapter_for(source)
    answers = generator(source).generate(requests(1.0), Decoding())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + STEPS and ids[-1] != 1:
            ids.append(int(distributions(source, adapter, ids)[0].argmax()))
        assert answer.tokens == ids[len(prompt) :]
    assert [a.tokens for a in answers] != own_generate(source)


@THREE
def test_an_answer_in_between_is_greedy_on_the_mixture(tiny_source, name: str):
    source, wanted = tiny_source(name), various()
    adapter = adapter_for(source)
    for request, answer in zip(wanted, generator(source).generate(wanted, Decoding()), strict=True):
        ids, total = list(request.prompt), 0.0
        for step, token in enumerate(answer.tokens):
            lam = torch.tensor([request.schedule.at(step, request.length)])
            log_p = mix(*distributions(source, adapter, ids), lam)[0]
            assert token == int(log_p.argmax())
            total += float(log_p[token])
            ids.append(token)
        assert answer.log_prob == pytest.approx(total, abs=1e-3)


def test_without_an_adapter_lambda_means_nothing(tiny_source):
    source = tiny_source("llama")
    alone = generator(source, adapter=False)
    one, two = (alone.generate(requests(lam), Decoding()) for lam in (0.0, 0.9))
    assert [a.tokens for a in one] == [a.tokens for a in two]


# ── batches ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "decoding", [Decoding(), Decoding("sample", top_p=0.9), Decoding("beam", beams=3)], ids=lambda d: d.kind
)
@THREE
def test_a_sequence_is_answered_alone_as_in_company(tiny_source, name: str, decoding: Decoding):
    together = generator(tiny_source(name)).generate(various(), decoding)
    assert len({answer.finish for answer in together} | {len(answer.tokens) for answer in together}) > 2
    for place, (request, answer) in enumerate(zip(various(), together, strict=True)):
        (alone,) = generator(tiny_source(name)).generate([request], decoding, streams=[place])
        assert (alone.tokens, alone.text, alone.finish) == (answer.tokens, answer.text, answer.finish)
        assert alone.log_prob == pytest.approx(answer.log_prob, abs=1e-3)


def test_no_session_stays_open_not_even_after_an_error(tiny_source):
    source = InProcessPLM(tiny_source("llama").plm)
    for decoding in (Decoding(), Decoding("beam")):
        generator(source).generate(requests(), decoding)
        failing = generator(source, stop=["x"])
        failing.detokenize = lambda ids: 1 / 0
        with pytest.raises(ZeroDivisionError):
            failing.generate(requests(), decoding)
    assert source._sessions == {}


# ── endings ─────────────────────────────────────────────────────────────────


def test_an_answer_ends_at_max_new_tokens(tiny_source):
    wanted = [Request(prompt, n, UnrollingSchedule(0.5)) for prompt, n in zip(PROMPTS, (1, 4, 9, 14), strict=True)]
    answers = generator(tiny_source("llama"), eos=[]).generate(wanted, Decoding())
    assert [len(answer.tokens) for answer in answers] == [1, 4, 9, 14]
    assert {answer.finish for answer in answers} == {"length"}
    decode = tiny_source("llama").plm.tokenizer.decode
    assert [a.text for a in answers] == [decode(a.tokens, skip_special_tokens=True) for a in answers]


def test_any_eos_id_ends_an_answer_and_is_not_in_its_text(tiny_source):
    source = tiny_source("llama")
    free = generator(source, eos=[]).generate(requests(), Decoding())
    eos = [free[0].tokens[3], free[1].tokens[5]]
    for answer, before in zip(generator(source, eos=eos).generate(requests(), Decoding()), free, strict=True):
        ends = [at for at, token in enumerate(before.tokens) if token in eos]
        if ends:
            assert answer.finish == "eos" and answer.tokens == before.tokens[: ends[0] + 1]
            assert answer.text == source.plm.tokenizer.decode(answer.tokens[:-1], skip_special_tokens=True)
        else:
            assert (answer.finish, answer.tokens) == ("length", before.tokens)


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_a_stop_string_ends_an_answer_and_is_cut_from_its_text(tiny_source, kind: str):
    source, decoding = tiny_source("llama"), Decoding(kind, beams=1)
    (free,) = generator(source, eos=[]).generate(requests()[:1], decoding)
    begin = len(free.text) - len(free.text.lstrip())
    stop = free.text[begin + 4 : begin + 7]  # crosses tokens, wherever their seams are
    (answer,) = generator(source, eos=[], stop=["never there", stop]).generate(requests()[:1], decoding)
    assert answer.finish == "stop" and answer.text == free.text[: free.text.index(stop, begin)]
    assert answer.tokens == free.tokens[: len(answer.tokens)]
    shorter = source.plm.tokenizer.decode(answer.tokens[:-1], skip_special_tokens=True)
    assert stop not in shorter[begin:]  # it stopped at the first token that completed it


def test_a_stop_string_before_the_first_word_does_not_end_an_answer(tiny_source):
    spoken = ["\n", "\n", "a", "b", "\n", "c"]
    scripted = generator(tiny_source("llama"), eos=[], stop=["\n"])
    scripted.detokenize = lambda ids: "".join(spoken[: len(ids)])
    (answer,) = scripted.generate(requests(steps=6)[:1], Decoding())
    assert (answer.text, answer.finish, len(answer.tokens)) == ("\n\nab", "stop", 5)


# ── sampling ────────────────────────────────────────────────────────────────


def test_a_seed_names_a_sample(tiny_source):
    ours = generator(tiny_source("llama"))

    def drawn(seed: int) -> list[list[int]]:
        return [a.tokens for a in ours.generate(requests(), Decoding("sample", temperature=2.0, seed=seed))]

    assert drawn(3) == drawn(3) != drawn(4)
    same = ours.generate([requests()[0]] * 3, Decoding("sample", temperature=2.0))
    assert len({tuple(answer.tokens) for answer in same}) == 3  # places in a batch draw apart
    apart = {tuple(ours.generate(requests()[:1], Decoding("sample", 2.0, seed=s))[0].tokens) for s in range(3)}
    assert len(apart) == 3 and apart.isdisjoint({tuple(a.tokens) for a in same[1:]})


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.6), (0.8, 0.9)])
def test_samples_follow_the_mixture(tiny_source, temperature: float, top_p: float):
    """Total variation of n draws over k tokens stays under ½√(k/n) + √(ln(1/δ)/2n), but for a chance of δ."""
    source, draws, delta, lam = tiny_source("gpt2"), 2000, 1e-6, 0.4
    log_p = mix(*distributions(source, adapter_for(source), PROMPTS[0]), torch.tensor([lam]))[0]
    p = (log_p.double() / temperature).softmax(-1)
    ordered, place = p.sort(descending=True)
    kept = int((ordered.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(p)  # the smallest set that holds top_p
    expected = torch.zeros_like(p)
    expected[place[:kept]] = ordered[:kept] / ordered[:kept].sum()
    wanted = [Request(PROMPTS[0], 1, UnrollingSchedule(lam))] * draws
    answers = generator(source).generate(wanted, Decoding("sample", temperature, top_p))
    seen = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=len(p)) / draws
    assert not seen[expected == 0].any()
    bound = 0.5 * math.sqrt(kept / draws) + math.sqrt(math.log(1 / delta) / (2 * draws))
    assert float((seen - expected).abs().sum()) / 2 < bound


def test_a_small_top_p_is_greedy(tiny_source):
    ours = generator(tiny_source("llama"))
    greedy, narrow = ours.generate(requests(), Decoding()), ours.generate(requests(), Decoding("sample", top_p=1e-6))
    assert [a.tokens for a in narrow] == [a.tokens for a in greedy]


def test_log_prob_is_that_of_the_mixture_not_of_what_was_drawn_from(tiny_source):
    ours = generator(tiny_source("llama"))
    greedy = ours.generate(requests(), Decoding())
    cold = ours.generate(requests(), Decoding("sample", temperature=1e-3, top_p=0.5))
    assert [a.tokens for a in cold] == [a.tokens for a in greedy]
    assert [a.log_prob for a in cold] == pytest.approx([a.log_prob for a in greedy])


# ── beams ───────────────────────────────────────────────────────────────────


def test_one_beam_is_greedy_wherever_eos_stands(tiny_source):
    source = tiny_source("llama")
    free = generator(source, eos=[]).generate(requests(), Decoding())
    for eos in sorted({token for answer in free for token in answer.tokens}):
        ours = generator(source, eos=[eos])
        greedy, beam = ours.generate(requests(), Decoding()), ours.generate(requests(), Decoding("beam", beams=1))
        assert [(a.tokens, a.text, a.finish) for a in beam] == [(a.tokens, a.text, a.finish) for a in greedy]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@THREE
def test_beams_at_lambda_0_are_transformers_own(tiny_source, name: str, length_penalty: float):
    source = tiny_source(name)
    eos = own_generate(source)[0][4]
    expected = own_generate(source, eos, num_beams=3, length_penalty=length_penalty, early_stopping=False)
    decoding = Decoding("beam", beams=3, length_penalty=length_penalty)
    answers = generator(source, eos=[eos]).generate(requests(0.0), decoding)
    assert [answer.tokens for answer in answers] == expected


def test_as_many_beams_as_tokens_find_the_best_answer_of_two(tiny_source):
    source, prompt, eos = tiny_source("llama"), PROMPTS[1], 300
    head, adapter = source.lm_head().head, adapter_for(source)
    schedule = UnrollingSchedule(0.8, "linear")
    V = head.vocab_size
    first = mix(*distributions(source, adapter, prompt), torch.tensor([schedule.at(0, 4)]))[0]
    state = source.extract(ExtractBatch([[*prompt, token] for token in range(V)], [len(prompt)] * V))
    lam = torch.full((V,), schedule.at(1, 4))
    second = mix(adapter.log_probs(state, head).detach(), head.log_probs(head.norm(state)), lam)
    both = first[:, None] + second
    both[eos] = -math.inf
    request = Request(prompt, 2, schedule, 4)
    decoding = Decoding("beam", beams=V, length_penalty=0.0)
    (best,) = generator(source, eos=[eos]).generate([request], decoding)
    assert best.log_prob == pytest.approx(max(float(both.max()), float(first[eos])), abs=1e-4)
    assert tuple(best.tokens) == divmod(int(both.argmax()), V)
    (greedy,) = generator(source, eos=[eos]).generate([request], Decoding())
    assert best.log_prob >= greedy.log_prob - 1e-4


@THREE
def test_a_beams_score_is_its_own_and_not_below_greedys_here(tiny_source, name: str):
    """Beam search may lose the greedy path; on these fixed models and prompts it finds better ones."""
    source = tiny_source(name)
    ours, adapter = generator(source, eos=[]), adapter_for(source)
    greedy = ours.generate(requests(0.6), Decoding())
    for prompt, beam, plain in zip(
        PROMPTS, ours.generate(requests(0.6), Decoding("beam", beams=4)), greedy, strict=True
    ):
        ids = prompt + beam.tokens
        pema, plm = distributions(source, adapter, ids[:-1], len(prompt) - 1)
        log_p = mix(pema, plm, torch.full((STEPS,), 0.6)).gather(1, torch.tensor(beam.tokens)[:, None])
        assert beam.log_prob == pytest.approx(float(log_p.sum()), abs=1e-3)
        assert beam.log_prob >= plain.log_prob - 1e-4


# ── traces ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["greedy", "sample", "beam"])
def test_a_trace_says_lambda_and_both_probabilities_of_every_token(tiny_source, kind: str):
    source, wanted = tiny_source("gpt2"), various()
    answers = generator(source).generate(wanted, Decoding(kind), explain=True)
    for request, answer in zip(wanted, answers, strict=True):
        ids = request.prompt + answer.tokens
        pema, plm = distributions(source, adapter_for(source), ids[:-1], len(request.prompt) - 1)
        token = torch.tensor(answer.tokens)[:, None]
        trace, lam = answer.trace, [request.schedule.at(t, request.length) for t in range(len(answer.tokens))]
        assert [t.token for t in trace] == answer.tokens
        assert [t.lam for t in trace] == pytest.approx(lam)
        assert [t.log_pema for t in trace] == pytest.approx(pema.gather(1, token)[:, 0].tolist(), abs=1e-3)
        assert [t.log_plm for t in trace] == pytest.approx(plm.gather(1, token)[:, 0].tolist(), abs=1e-3)
        mixed = [math.log(t.lam * math.exp(t.log_pema) + (1 - t.lam) * math.exp(t.log_plm)) for t in trace]
        assert sum(mixed) == pytest.approx(answer.log_prob, abs=1e-4)


def test_a_trace_is_whole_at_lambda_0_and_1_and_changes_no_answer(tiny_source):
    source = tiny_source("llama")
    for lam in (0.0, 1.0):
        plain = generator(source).generate(requests(lam), Decoding())
        told = generator(source).generate(requests(lam), Decoding(), explain=True)
        assert [a.tokens for a in told] == [a.tokens for a in plain] and not plain[0].trace
        for answer in told:
            side = [t.log_pema if lam else t.log_plm for t in answer.trace]
            assert sum(side) == pytest.approx(answer.log_prob, abs=1e-4)
            assert all(t.log_pema != t.log_plm for t in answer.trace)
    (alone,) = generator(source, adapter=False).generate(requests()[:1], Decoding(), explain=True)
    assert all(t.lam == 0 and t.log_pema == t.log_plm for t in alone.trace) and isinstance(alone, Generated)


# ── faults ──────────────────────────────────────────────────────────────────


class Forgetful:
    """A PLM owner that loses every session's cache after each answer it gives."""

    def __init__(self, source: InProcessPLM, every: int) -> None:
        self.source, self.every, self.calls, self.lost = source, every, 0, 0

    def open(self, prompts):
        return self.source.open(prompts)

    def extend(self, session, position, rows, tokens):
        self.calls += 1
        if self.calls % self.every == 0:
            self.lost += 1
            self.source.close(session)
        return self.source.extend(session, position, rows, tokens)

    def close(self, session):
        self.source.close(session)


@pytest.mark.parametrize("kind", ["greedy", "beam"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_lost_session_is_opened_again_with_the_same_answer(tiny_source, kind: str, every: int):
    source = tiny_source("llama")
    before, adapter, decoding = set(source._sessions), adapter_for(source), Decoding(kind, beams=3)
    undisturbed = generator(source, adapter).generate(requests(), decoding)
    forgetful = Forgetful(source, every)
    disturbed = generator(source, adapter)
    disturbed.source = forgetful
    answers = disturbed.generate(requests(), decoding)
    assert forgetful.lost > 0
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in undisturbed]
    assert set(source._sessions) == before
