"""A patient client waits out temporary failures, reports them, and ends with one line for any other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped
from pema_ray.line.prefix import Prefix, PrefixShape
from pema_ray.line.protocol import PrefixLost
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


class Adaptable(Scripted):
    """Takes prefixes too; puts are recorded and succeed."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        self.puts: list[str] = []

    async def put_prefix(self, prefix: Prefix) -> None:
        self.puts.append(prefix.handle)

    async def gradient(self, batch: ExtractBatch, d_state_NH: torch.Tensor) -> torch.Tensor:
        return self._next(batch)

    describe = lm_head = read_prefix = end = Scripted.close  # never called


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds of each pause; no time passes."""
    seconds_slept: list[float] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        seconds_slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("pema_ray.line.retry.asyncio.sleep", sleep)
    monkeypatch.setattr("pema_ray.line.retry.time.monotonic", lambda: now[0])
    return seconds_slept


def patient(*answers: Any, seconds: float = 600.0) -> tuple[PatientPLM, Scripted, list[str]]:
    scripted, reports = Scripted(*answers), []
    return PatientPLM(scripted, seconds, reports.append), scripted, reports


async def test_a_busy_plm_owner_is_asked_again_after_its_retry_after(pauses: list[float]):
    plm, _, reports = patient(Busy(QUOTA, 12.0), Busy(QUOTA, 3.0), "rows")
    assert await plm.extract(BATCH) == "rows"
    assert pauses == [12.0, 3.0]
    waiting = "waiting for the PLM owner: quota of 200000 rows a minute"
    assert reports == [f"{waiting}, 12 s", "", f"{waiting}, 3 s", ""]


async def test_pauses_grow_while_nobody_answers(pauses: list[float]):
    plm, _, reports = patient(*[ConnectionError("connection refused.")] * 9, "rows")
    assert await plm.extract(BATCH) == "rows"
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert reports[0] == "waiting for the PLM owner: connection refused, 1 s"


async def test_patience_ends_with_the_last_reason_and_what_to_do(pauses: list[float]):
    plm, scripted, _ = patient(*[Busy(QUOTA, 25.0)] * 9, seconds=60.0)
    with pytest.raises(UserError) as caught:
        await plm.extract(BATCH)
    assert str(caught.value) == (
        "The PLM owner did not answer for 60 s: quota of 200000 rows a minute. "
        "Start again when it does; what is finished is kept."
    )
    assert pauses == [25.0, 25.0] and len(scripted.calls) == 3


@pytest.mark.parametrize("error", [UserError("the key was revoked"), FingerprintMismatch("url", "a", "b"), KeyError()])
async def test_a_permanent_failure_ends_the_call_at_once(pauses: list[float], error: Exception):
    plm, scripted, reports = patient(error, "rows")
    with pytest.raises(type(error)) as caught:
        await plm.extract(BATCH)
    assert caught.value is error and not pauses and not reports and len(scripted.calls) == 1


async def test_patience_is_with_the_plm_owner_not_with_one_call(pauses: list[float]):
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
    assert sum(pauses) == 100.0


async def test_of_several_steps_only_the_busy_ones_are_repeated(pauses: list[float]):
    one, two, three = (Step(name, 0, [5]) for name in "abc")
    stepped = [Stepped(torch.zeros(1, 2)) for _ in range(2)]
    lost = SessionLost()
    plm, scripted, _ = patient(
        [Busy("no slot", 1.0), lost, Busy("no slot", 4.0)],
        ConnectionError(),
        [stepped[0], Busy("no slot", 2.0)],
        [stepped[1]],
    )
    assert await plm.step([one, two, three]) == [stepped[0], lost, stepped[1]]
    assert scripted.calls == [[one, two, three], [one, three], [one, three], [three]]
    assert pauses == [4.0, 0.5, 2.0]


async def test_an_opening_that_does_not_wait_is_not_repeated_with_a_lost_message(pauses: list[float]):
    lost, opening = Step("a", 3, [5]), Step("b", 0, [5], waits=False)
    stepped, full = Stepped(torch.zeros(1, 2)), Busy("no slot", 0.0)
    plm, scripted, _ = patient([ConnectionError(), full], [stepped])
    assert await plm.step([lost, opening]) == [stepped, full]
    assert scripted.calls == [[lost, opening], [lost]]


async def test_a_plm_owner_that_is_never_ready_for_a_step_ends_it(pauses: list[float]):
    plm, _, _ = patient(*[[Busy("no slot", 20.0)]] * 9, seconds=60.0)
    with pytest.raises(UserError, match="did not answer for 60 s: no slot"):
        await plm.step([Step("a", 0, [5])])
    assert pauses == [20.0] * 3


async def test_closing_is_not_waited_for(pauses: list[float]):
    plm, scripted, _ = patient(ConnectionError("closed"))
    await plm.close(["a"])
    assert scripted.calls == [["a"]] and not pauses


async def test_a_call_that_is_cancelled_while_it_waits_waits_no_more():
    plm, _, reports = patient(Busy(QUOTA, 100.0))
    call = asyncio.create_task(plm.extract(BATCH))
    while not reports:
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert reports[-1] == ""


async def test_the_report_is_cleared_only_when_no_call_waits():
    plm, _, reports = patient(Busy("long", 100.0), Busy("short", 0.0), "rows")
    calls = [asyncio.create_task(plm.extract(BATCH)) for _ in range(2)]
    assert await calls[1] == "rows"
    assert reports == ["waiting for the PLM owner: long, 100 s", "waiting for the PLM owner: short, 1 s"]
    calls[0].cancel()


async def test_a_lost_prefix_is_put_again_once_for_each_loss(pauses):
    prefix = Prefix(torch.zeros(2, 8), PrefixShape(1, 1, 4))
    batch, gradient = ExtractBatch([[1, 2]], [0], handle=prefix.handle), torch.ones(2, 8)
    client = Adaptable(PrefixLost(), Busy(QUOTA, 9.0), Busy(QUOTA, 9.0), PrefixLost(), gradient)
    plm = PatientPLM(client, 600.0)
    await plm.put_prefix(prefix)
    assert await plm.gradient(batch, torch.ones(2, 3)) is gradient
    assert client.puts == [prefix.handle] * 3  # at first, and after two losses
    client.answers = [PrefixLost()]
    with pytest.raises(PrefixLost):  # of another prefix, which this client has not put
        await plm.gradient(ExtractBatch([[1]], [0], handle="another"), torch.ones(1, 3))
