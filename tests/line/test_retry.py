"""A patient client waits for what time mends, says what for, and ends with one line for the rest."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped
from pema_ray.line.retry import PatientPLM

BATCH = ExtractBatch([[1, 2]], [0])
QUOTA = "quota of 200000 rows a minute"


class Scripted:
    """Answers each call with the next of these; errors are raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.calls = list(answers), []

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        return self._next(batch)

    async def step(self, steps: list[Step]) -> list[Stepped | Exception]:
        return self._next(list(steps))

    async def close(self, sessions: list[str]) -> None:
        self._next(sessions)

    def _next(self, call: Any) -> Any:
        self.calls.append(call)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Seconds that were waited, which pass at once."""
    waits: list[float] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("pema_ray.line.retry.asyncio.sleep", sleep)
    monkeypatch.setattr("pema_ray.line.retry.time.monotonic", lambda: now[0])
    return waits


def patient(*answers: Any, seconds: float = 600.0) -> tuple[PatientPLM, Scripted, list[str]]:
    scripted, told = Scripted(*answers), []
    return PatientPLM(scripted, seconds, told.append), scripted, told


async def test_busy_is_waited_for_as_long_as_the_plm_owner_says(slept: list[float]):
    plm, _, told = patient(Busy(QUOTA, 12.0), Busy(QUOTA, 3.0), "rows")
    assert await plm.extract(BATCH) == "rows"
    assert slept == [12.0, 3.0]
    waiting = "waiting for the PLM owner: quota of 200000 rows a minute"
    assert told == [f"{waiting}, 12 s", "", f"{waiting}, 3 s", ""]


async def test_pauses_grow_while_nobody_answers(slept: list[float]):
    plm, _, told = patient(*[ConnectionError("connection refused.")] * 9, "rows")
    assert await plm.extract(BATCH) == "rows"
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert told[0] == "waiting for the PLM owner: connection refused, 1 s"


async def test_patience_ends_with_the_last_reason_and_what_to_do(slept: list[float]):
    plm, scripted, _ = patient(*[Busy(QUOTA, 25.0)] * 9, seconds=60.0)
    with pytest.raises(UserError) as caught:
        await plm.extract(BATCH)
    assert str(caught.value) == (
        "The PLM owner did not answer for 60 s: quota of 200000 rows a minute. "
        "Start again when it does; what is finished is kept."
    )
    assert slept == [25.0, 25.0] and len(scripted.calls) == 3


@pytest.mark.parametrize("error", [UserError("the key was revoked"), FingerprintMismatch("url", "a", "b"), KeyError()])
async def test_what_time_does_not_mend_ends_the_call_at_once(slept: list[float], error: Exception):
    plm, scripted, told = patient(error, "rows")
    with pytest.raises(type(error)) as caught:
        await plm.extract(BATCH)
    assert caught.value is error and not slept and not told and len(scripted.calls) == 1


async def test_patience_is_with_the_plm_owner_not_with_one_call(slept: list[float]):
    """A small quota may let others' rows through for longer than one call can wait."""
    plm, scripted, _ = patient(*[Busy(QUOTA, 25.0)] * 2, "others'", *[Busy(QUOTA, 25.0)] * 2, "rows", seconds=60.0)
    answer = scripted.extract

    async def extract(batch: ExtractBatch) -> torch.Tensor:
        if len(scripted.calls) == 2:  # while this call waits, another is answered
            scripted.calls.append("turn")
            assert await plm.extract(batch) == "others'"
        return await answer(batch)

    scripted.extract = extract
    assert await plm.extract(BATCH) == "rows"
    assert sum(slept) == 100.0


async def test_of_several_steps_only_the_busy_ones_are_repeated(slept: list[float]):
    one, two, three = (Step(name, 0, [5]) for name in "abc")
    done = [Stepped(torch.zeros(1, 2)) for _ in range(2)]
    lost = SessionLost()
    plm, scripted, _ = patient(
        [Busy("no slot", 1.0), lost, Busy("no slot", 4.0)],
        ConnectionError(),
        [done[0], Busy("no slot", 2.0)],
        [done[1]],
    )
    assert await plm.step([one, two, three]) == [done[0], lost, done[1]]
    assert scripted.calls == [[one, two, three], [one, three], [one, three], [three]]
    assert slept == [4.0, 0.5, 2.0]


async def test_openings_that_do_not_wait_are_told_while_a_lost_message_is_repeated(slept: list[float]):
    lost, opening = Step("a", 3, [5]), Step("b", 0, [5], waits=False)
    done, full = Stepped(torch.zeros(1, 2)), Busy("no slot", 0.0)
    plm, scripted, _ = patient([ConnectionError(), full], [done])
    assert await plm.step([lost, opening]) == [done, full]
    assert scripted.calls == [[lost, opening], [lost]]


async def test_a_plm_owner_that_is_never_ready_for_a_step_ends_it(slept: list[float]):
    plm, _, _ = patient(*[[Busy("no slot", 20.0)]] * 9, seconds=60.0)
    with pytest.raises(UserError, match="did not answer for 60 s: no slot"):
        await plm.step([Step("a", 0, [5])])
    assert slept == [20.0] * 3


async def test_closing_is_not_waited_for(slept: list[float]):
    plm, scripted, _ = patient(ConnectionError("gone"))
    await plm.close(["a"])
    assert scripted.calls == [["a"]] and not slept


async def test_a_call_that_is_cancelled_while_it_waits_waits_no_more():
    plm, _, told = patient(Busy(QUOTA, 100.0))
    call = asyncio.create_task(plm.extract(BATCH))
    while not told:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert told[-1] == ""


async def test_the_word_is_taken_back_only_when_no_call_waits():
    plm, _, told = patient(Busy("long", 100.0), Busy("short", 0.0), "rows")
    calls = [asyncio.create_task(plm.extract(BATCH)) for _ in range(2)]
    assert await calls[1] == "rows"
    assert told == ["waiting for the PLM owner: long, 100 s", "waiting for the PLM owner: short, 1 s"]
    calls[0].cancel()
