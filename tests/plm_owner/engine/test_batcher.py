"""A session's states are those of its own text alone, whichever sessions join, continue, rewind or leave."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from batcher_kit import CLOSE, Clock, finish, positions_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pema_ray.errors import UserError
from pema_ray.line import Busy, SessionLost, Step, Stepped
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.engine import Batcher, EngineConfig
from pema_ray.plm_owner.engine.batcher import Job
from pema_ray.plm_owner.engine.checks import plain_states
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.load import load_plm

TOKEN = st.integers(3, 299)
PREFIX = [11, 250, 4, 87, 33, 190, 8, 8, 61, 275, 140, 19, 92, 5, 201, 77, 118, 36, 299, 3]


class Sessions(RuleBasedStateMachine):
    """Sessions that join, continue, rewind, repeat, draft, leave and are evicted, in any order.

    Steps queue, so that one pass takes many.
    """

    plm: Any
    head: Any

    def __init__(self) -> None:
        super().__init__()
        settings = EngineConfig(slots=3, pass_tokens=24, idle_seconds=0.0)
        self.batcher = Batcher(self.plm, self.head, settings, Clock())
        self.texts: dict[str, list[int]] = {}
        self.waiting: list[tuple[Step, list[int], Job]] = []
        self.made = 0

    def teardown(self) -> None:
        self.answer()
        for number in range(1, self.made + 1):
            self.batcher.close("me", f"s{number}")
        assert self.batcher.live_sessions == 0
        assert not self.batcher.busy

    def _submit(self, step: Step, ids: list[int]) -> None:
        self.waiting.append((step, ids, self.batcher.submit("me", step)))

    def _idle(self) -> list[str]:
        busy = {step.session for step, *_ in self.waiting}
        return sorted(name for name in self.texts if name not in busy)

    @rule(shared=st.sampled_from([0, 9, 20]), own=st.lists(TOKEN, min_size=1, max_size=30), states=st.integers(1, 50))
    def join(self, shared: int, own: list[int], states: int) -> None:
        ids = [*PREFIX[:shared], *own]
        self.made += 1
        self._submit(Step(f"s{self.made}", 0, ids, min(states, len(ids))), ids)

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), new=st.lists(TOKEN, min_size=1, max_size=20), states=st.integers(1, 20),
          draft=st.sampled_from([0, 0, 3]), back=st.integers(0, 40))  # fmt: skip
    def continue_(self, data: st.DataObject, new: list[int], states: int, draft: int, back: int) -> None:
        name = data.draw(st.sampled_from(self._idle()))
        position = max(1, len(self.texts[name]) - back)
        ids = [*self.texts[name][:position], *new]
        if len(ids) + draft <= 90:
            self._submit(Step(name, position, new, min(states, len(new)), draft), ids)

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), again=st.integers(1, 20))
    def repeat(self, data: st.DataObject, again: int) -> None:
        name = data.draw(st.sampled_from(self._idle()))
        text = self.texts[name]
        position = max(1, len(text) - again)
        if position < len(text):
            self._submit(Step(name, position, text[position:]), list(text))

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._idle()))
        self.batcher.close("me", name)
        del self.texts[name]

    @rule()
    def one_pass(self) -> None:
        self.batcher.run()
        assert self.batcher.live_sessions <= 3

    @rule()
    def answer(self) -> None:
        """Answer all waiting steps, each with the states of its text alone."""
        waiting, self.waiting = self.waiting, []
        for (step, ids, _), result in zip(waiting, finish(self.batcher, *(job for *_, job in waiting)), strict=True):
            if isinstance(result, SessionLost):
                assert step.position > 0
                del self.texts[step.session]
                continue
            assert isinstance(result, Stepped)
            assert len(result.drafted) == step.draft
            ids = [*ids, *result.drafted]
            expected = plain_states(self.plm, ids)[-step.states - step.draft :]
            torch.testing.assert_close(result.state_NH, expected, **CLOSE)
            self.texts[step.session] = ids
        assert self.batcher.live_sessions <= 3


def test_any_history_of_sessions_gives_the_states_of_each_text_alone(tiny_plm):
    plm = tiny_plm("llama")
    machine = type("Sessions", (Sessions,), {"plm": plm, "head": export_lm_head(plm).head})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_sessions_gives_the_states_of_each_text_alone(architecture: str, batcher_of, tiny_plm, seed):
    """Random joins, extensions by several tokens, rewinds, repeats, drafts, closings and evictions."""
    draw = random.Random(f"{architecture} {seed}")
    batcher, plm = batcher_of(architecture, slots=4, pass_tokens=24, idle_seconds=0.0), tiny_plm(architecture)
    prefix = [draw.randrange(3, 300) for _ in range(20)]
    texts: dict[str, list[int]] = {}
    lost = 0
    for round_ in range(25):
        steps: list[tuple[Step, list[int]]] = []
        for name in draw.sample(sorted(texts), min(len(texts), draw.randrange(4))):
            text = texts[name]
            position = len(text) if draw.random() < 0.6 else draw.randrange(1, len(text) + 1)
            new = [draw.randrange(3, 300) for _ in range(draw.choice([1, 1, 1, 2, 5, 20]))]
            ids = [*text[:position], *new]
            if len(ids) <= 80:
                draft = draw.choice([0, 0, 0, 3])
                steps.append((Step(name, position, new, draw.randrange(1, len(new) + 1), draft), ids))
        for number in range(draw.randrange(3)):
            ids = [*prefix[: draw.choice([0, 9, 20])], *(draw.randrange(3, 300) for _ in range(draw.randrange(1, 30)))]
            steps.append((Step(f"{round_}.{number}", 0, ids, draw.randrange(1, len(ids) + 1)), ids))
        jobs = [batcher.submit("me", step) for step, _ in steps]
        for (step, ids), result in zip(steps, finish(batcher, *jobs), strict=True):
            if isinstance(result, SessionLost):
                assert step.position > 0
                lost += 1
                texts.pop(step.session)
                continue
            assert isinstance(result, Stepped)
            ids = [*ids, *result.drafted]
            assert len(result.drafted) == step.draft
            expected = plain_states(plm, ids)[-step.states - step.draft :]
            torch.testing.assert_close(result.state_NH, expected, **CLOSE)
            texts[step.session] = ids
            if step.draft:
                logits = plm.model(torch.tensor([ids])).logits[0, -step.draft - 1 : -1]
                chosen_logits = logits.gather(-1, torch.tensor(result.drafted)[:, None])[:, 0]
                torch.testing.assert_close(chosen_logits, logits.max(-1).values, **CLOSE)
        if texts and draw.random() < 0.3:
            closed = draw.choice(sorted(texts))
            batcher.close("me", closed)
            del texts[closed]
        assert batcher.live_sessions <= 4
    assert lost  # slots were scarce, so that eviction was tried too
    for name in texts:
        batcher.close("me", name)
    assert batcher.live_sessions == 0
    assert not batcher.busy


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bfloat16_states_are_those_of_a_plain_bfloat16_pass(kind, tiny_plm_folder):
    """As close as bfloat16 passes of different shapes are to each other."""
    plm = load_plm(PLMConfig(name=tiny_plm_folder(kind), dtype="bfloat16", device="cpu", threads=1))
    batcher = Batcher(plm, export_lm_head(plm).head, EngineConfig(slots=4, pass_tokens=24))
    draw = random.Random(kind)
    texts = {name: [draw.randrange(3, 300) for _ in range(length)] for name, length in (("a", 40), ("b", 7), ("c", 23))}
    states = {name: [] for name in texts}
    cuts = {"a": (30, 31, 36, 40), "b": (1, 4, 6, 7), "c": (20, 21, 22, 23)}
    for step in range(4):
        jobs = {}
        for name, text in texts.items():
            begin = cuts[name][step - 1] if step else 0
            new = text[begin : cuts[name][step]]
            jobs[name] = batcher.submit("me", Step(name, begin, new, len(new)))
        finish(batcher, *jobs.values())
        for name, job in jobs.items():
            assert job.result.state_NH.dtype == torch.bfloat16
            states[name].append(job.result.state_NH)
    for name, text in texts.items():
        expected, actual = plain_states(plm, text).float(), torch.cat(states[name]).float()
        error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.02, (name, error)


def test_all_sessions_that_wait_for_a_token_share_one_pass(batcher_of):
    batcher = batcher_of("llama", slots=8)
    finish(batcher, *[batcher.submit("me", Step(f"s{i}", 0, range(3, 5 + i))) for i in range(6)])
    jobs = [batcher.submit("me", Step(f"s{i}", 2 + i, [9])) for i in range(6)]
    assert len(batcher.run()) == 6
    assert batcher.passes == [(6, 6)]
    assert all(isinstance(job.result, Stepped) for job in jobs)


def test_a_long_prompt_is_prefilled_in_pieces_between_the_steps_of_others(batcher_of):
    batcher = batcher_of("llama", slots=2, pass_tokens=20)
    finish(batcher, batcher.submit("me", Step("short", 0, [5])))
    long = batcher.submit("me", Step("long", 0, range(3, 73)))
    for position in range(1, 4):
        short = batcher.submit("me", Step("short", position, [7]))
        assert batcher.run() == [short]
        assert batcher.passes == [(1, 1)]
        assert batcher.run() == []  # then exactly one piece of the prompt
        assert batcher.passes == [(1, 20)]
        assert long.result is None
    finish(batcher, long)


def test_a_prompt_that_begins_as_another_is_computed_from_where_they_part(batcher_of, tiny_plm):
    batcher = batcher_of("llama", slots=4, pass_tokens=200)
    prefix = list(range(3, 83))
    first = [batcher.submit("me", Step(f"s{i}", 0, [*prefix, 100 + i])) for i in range(3)]
    assert positions_until(batcher, *first) == 81 + 2  # the other two waited for the first one's cache
    for i, job in enumerate(first):
        expected = plain_states(tiny_plm("llama"), [*prefix, 100 + i])[-1:]
        torch.testing.assert_close(job.result.state_NH, expected, **CLOSE)
    foreign = batcher.submit("somebody else", Step("s", 0, [*prefix, 7]))
    batcher.run()
    assert batcher.passes == [(1, 81)]  # caches of different owners never meet
    assert isinstance(foreign.result, Stepped)


def test_a_repeated_step_gives_the_same_and_costs_one_token(batcher_of):
    batcher = batcher_of("llama", slots=2)
    finish(batcher, batcher.submit("me", Step("s", 0, range(3, 40))))
    first, again = (finish(batcher, batcher.submit("me", Step("s", 37, [4, 5])))[0] for _ in range(2))
    torch.testing.assert_close(first.state_NH, again.state_NH, **CLOSE)
    reopened = finish(batcher, batcher.submit("me", Step("s", 0, [*range(3, 40), 4, 5])))[0]
    assert batcher.passes == [(1, 1)]
    torch.testing.assert_close(reopened.state_NH, first.state_NH, **CLOSE)


def test_unknown_and_forgotten_sessions_and_gaps_are_lost(batcher_of, clock):
    batcher = batcher_of("llama", slots=1, idle_seconds=5.0)
    assert isinstance(finish(batcher, batcher.submit("me", Step("never", 3, [5])))[0], SessionLost)
    finish(batcher, batcher.submit("me", Step("a", 0, [5, 6])))
    assert isinstance(finish(batcher, batcher.submit("me", Step("a", 3, [5])))[0], SessionLost)
    assert isinstance(finish(batcher, batcher.submit("you", Step("a", 2, [5])))[0], SessionLost)
    waiting = batcher.submit("me", Step("b", 0, [5, 6]))
    batcher.run()
    assert waiting.result is None  # the only slot is taken, and its session was heard of just now
    clock.now = 5.0
    assert isinstance(finish(batcher, waiting)[0], Stepped)
    assert isinstance(finish(batcher, batcher.submit("me", Step("a", 2, [5])))[0], SessionLost)
    batcher.close("me", "a")  # already evicted


def test_a_session_whose_owner_has_died_is_forgotten_after_a_while(batcher_of, clock):
    batcher = batcher_of("llama", slots=4, idle_seconds=1.0, forget_seconds=60.0)
    finish(batcher, *[batcher.submit("me", Step(name, 0, [5, 6])) for name in ("dead", "alive")])
    clock.now = 59.0
    finish(batcher, batcher.submit("me", Step("alive", 2, [7])))
    batcher.forget_abandoned()
    assert batcher.live_sessions == 2
    clock.now = 60.0
    batcher.forget_abandoned()
    assert batcher.live_sessions == 1
    assert isinstance(finish(batcher, batcher.submit("me", Step("dead", 2, [5])))[0], SessionLost)
    assert isinstance(finish(batcher, batcher.submit("me", Step("alive", 3, [5])))[0], Stepped)


def test_an_opening_without_a_slot_in_time_is_busy(batcher_of, clock):
    batcher = batcher_of("llama", slots=1)
    finish(batcher, batcher.submit("me", Step("a", 0, [5])))
    late = batcher.submit("me", Step("b", 0, [5]), deadline=2.0)
    batcher.run()
    assert late.result is None
    clock.now = 2.5
    assert batcher.run() == [late]
    assert isinstance(late.result, Busy)
    assert not batcher.busy


def test_an_opening_that_does_not_wait_is_busy_after_a_moment_and_steps_go_on(batcher_of, clock):
    batcher = batcher_of("llama", slots=1)
    finish(batcher, batcher.submit("me", Step("a", 0, [5])))
    waiting = batcher.submit("me", Step("c", 0, [5]), deadline=100.0)
    opening, step = (
        batcher.submit("me", Step(*s, waits=False), deadline=100.0) for s in [("b", 0, [5]), ("a", 1, [6])]
    )
    assert batcher.run() == [step]
    clock.now = 0.5
    assert batcher.run() == [opening]
    assert isinstance(opening.result, Busy) and opening.result.retry_after == 0
    assert isinstance(step.result, Stepped) and waiting.result is None
    batcher.close("me", "a")
    assert isinstance(finish(batcher, waiting)[0], Stepped)


def test_an_opening_that_does_not_wait_for_a_slot_waits_for_a_prompt_that_it_shares(batcher_of, clock):
    batcher = batcher_of("llama", slots=2, pass_tokens=20)
    prompt = list(range(3, 95))
    first, second = (batcher.submit("me", Step(name, 0, prompt, waits=False)) for name in "ab")
    batcher.run()
    clock.now = 10.0  # a long pass
    results = finish(batcher, first, second)
    assert [type(result) for result in results] == [Stepped, Stepped], results


def test_an_opening_that_waits_for_a_prompt_it_shares_keeps_its_place_in_the_line(batcher_of):
    batcher = batcher_of("llama", slots=2, pass_tokens=20)
    prompts = {"me": list(range(3, 95)), "you": list(range(195, 103, -1))}
    lines = {owner: [batcher.submit(owner, Step(name, 0, ids)) for name in "ab"] for owner, ids in prompts.items()}
    assert all(isinstance(result, Stepped) for result in finish(batcher, *lines["me"]))
    assert all(job.slot is None for job in lines["you"])
    for name in "ab":
        batcher.close("me", name)
    assert all(isinstance(result, Stepped) for result in finish(batcher, *lines["you"]))


def test_a_closed_session_leaves_its_slot_in_the_middle_of_its_prompt(batcher_of):
    batcher = batcher_of("llama", slots=1, pass_tokens=20)
    closed, next_ = batcher.submit("me", Step("a", 0, range(3, 90))), batcher.submit("me", Step("b", 0, [5]))
    batcher.run()
    assert closed.result is None
    batcher.close("me", "a")
    assert isinstance(finish(batcher, next_)[0], Stepped)
    assert isinstance(closed.result, SessionLost)
    assert batcher.live_sessions == 1


def test_a_session_that_is_closed_before_it_is_opened_is_not_opened(batcher_of):
    """Its close overtook its opening; another owner's session of the same name is opened."""
    batcher = batcher_of("llama", slots=2)
    batcher.close("me", "late")
    jobs = (batcher.submit(owner, Step("late", 0, [5, 6])) for owner in ("me", "you"))
    lost, opened = finish(batcher, *jobs)
    assert isinstance(lost, SessionLost) and isinstance(opened, Stepped)
    assert batcher.live_sessions == 1
    (again,) = finish(batcher, batcher.submit("me", Step("late", 0, [5, 6])))
    assert isinstance(again, Stepped)  # one close refuses one opening
    for number in range(3000):  # memory is bounded
        batcher.close("me", str(number))
    assert len(batcher._sessions._closed_before) <= 1024


def test_texts_that_are_too_long_are_refused_without_harm_to_others(batcher_of):
    batcher = batcher_of("llama", slots=2, max_tokens=30)
    good = batcher.submit("me", Step("a", 0, range(3, 30)))
    long = batcher.submit("me", Step("b", 0, range(3, 34)))
    finish(batcher, good, long)
    assert isinstance(long.result, UserError)
    assert "31 tokens is longer than" in str(long.result)
    assert batcher.live_sessions == 1
    drafted = batcher.submit("me", Step("a", 27, [3, 4], draft=2))
    assert "31 tokens" in str(finish(batcher, drafted)[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"session": ""},
        {"position": -1},
        {"tokens": []},
        {"states": 0},
        {"states": 3},
        {"draft": -1},
    ],
)
def test_steps_that_make_no_sense_are_not_made(wrong):
    with pytest.raises(ValueError, match=r"session|position|states"):
        Step(**({"session": "s", "position": 0, "tokens": [1, 2]} | wrong))


def test_a_retry_of_a_cancelled_opening_is_answered(batcher_of):
    batcher = batcher_of("llama", slots=2)
    first = batcher.submit("me", Step("s", 0, list(range(3, 60))))
    batcher.run()
    first.cancelled = True
    (result,) = finish(batcher, batcher.submit("me", Step("s", 0, [5, 6])))
    assert isinstance(result, Stepped)
    assert not batcher.busy
