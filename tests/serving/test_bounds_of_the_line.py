"""A data owner's use of a PLM owner's public service is bounded, and nothing blocks the service's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import httpx
import pytest
from https_kit import Owner

from pema_ray.line import Step, codec
from pema_ray.plm_owner.service import access as access_module
from pema_ray.plm_owner.service.access import Account, Client, Quota, Refused, Reservation, add_client, hash_of
from pema_ray.plm_owner.service.api import RequestLimits


@pytest.fixture
def owner_of(tmp_path, tiny_plm_folder):
    return lambda **settings: Owner(tmp_path, tiny_plm_folder("llama"), **settings)


class Upload:
    """A request whose body pauses after `first` until `resume` is set."""

    def __init__(self, http: httpx.AsyncClient, first: bytes, second: bytes, path: str = "/v1/sessions/step") -> None:
        self.resume = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield first
            await self.resume.wait()
            yield second

        self.answer = asyncio.create_task(http.post(path, content=parts()))


async def until(holds) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def account_of(owner: Owner) -> Account:
    return owner.access.account(f"Bearer {owner.key}")


def assert_retry_later(response: httpx.Response, words: str) -> None:
    assert response.status_code == 429, response.text
    assert int(response.headers["Retry-After"]) >= 1
    assert words in response.json()["error"]["message"]


async def test_a_data_owner_has_so_many_requests_under_way_and_no_more(owner_of):
    async with owner_of(limits=RequestLimits(max_requests=2)) as owner, owner.raw() as http:
        step = owner.steps(Step("a", 0, [5]))
        second_key = add_client(owner.keys, "another", Quota())
        uploads = [Upload(http, step[:5], step[5:]) for _ in range(2)]
        await until(lambda: account_of(owner).requests == 2)
        assert_retry_later(await http.post("/v1/sessions/step", content=step), "2 requests of yours are under way")
        assert (await http.post("/v1/sessions/close", json=["b"])).status_code == 204  # it makes room
        assert (await http.post("/v1/sessions/close", content=b" " * (2**20 + 1))).status_code == 413
        response = await http.post("/v1/sessions/step", content=step, headers={"Authorization": f"Bearer {second_key}"})
        assert response.status_code == 200  # one owner's excess does not affect another
        for upload in uploads:
            upload.resume.set()
        assert {(await upload.answer).status_code for upload in uploads} == {200}
        assert (await http.post("/v1/sessions/step", content=step)).status_code == 200
        await until(lambda: account_of(owner).requests == 0)
        assert account_of(owner).reserved_bytes == 0


async def test_who_goes_away_in_the_middle_of_a_body_holds_nothing_any_more(owner_of):
    async with owner_of(limits=RequestLimits(max_requests=1)) as owner:
        step = owner.steps(Step("a", 0, [5]))
        async with owner.raw() as http:
            upload = Upload(http, step[:5], step[5:])
            await until(lambda: account_of(owner).reserved_bytes == 5)
            upload.answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await upload.answer
        await until(lambda: (account_of(owner).requests, account_of(owner).reserved_bytes) == (0, 0))
        async with owner.raw() as http:
            assert (await http.post("/v1/sessions/step", content=step)).status_code == 200
        assert 499 in {entry["status"] for entry in owner.log()}


async def test_bodies_and_answers_that_are_held_together_are_bounded(owner_of):
    async with owner_of(limits=RequestLimits(max_held_mb=0.02)) as owner, owner.raw() as http:
        batch = owner.batch(*[[5] * 80] * 40, first=79)  # 13 kB, and 5 kB of answer
        upload = Upload(http, batch[:10_000], batch[10_000:], "/v1/extract")
        await until(lambda: account_of(owner).reserved_bytes == 10_000)
        assert_retry_later(await http.post("/v1/extract", content=batch), "Your requests under way hold")
        many = owner.batch(*[[5] * 80] * 2)  # less than 1 kB, and 20 kB of answer
        assert_retry_later(await http.post("/v1/extract", content=many), "Your requests under way hold")
        upload.resume.set()
        assert (await upload.answer).status_code == 200
        await until(lambda: account_of(owner).reserved_bytes == 0)
        alone = owner.batch(*[[5] * 80] * 9)  # more than all may have, by itself
        assert (await http.post("/v1/extract", content=alone)).status_code == 200


def test_what_is_held_is_counted_to_the_byte():
    account = Account(Client(name="a", key_sha256="0" * 64))
    with Reservation(account, 2, 100) as first:
        first.add(80)
        with Reservation(account, 2, 100) as second:
            second.add(20)
            with pytest.raises(Refused) as raised:
                second.add(1)
            assert (raised.value.status, raised.value.retry_after) == (429, 1.0)
            with pytest.raises(Refused), Reservation(account, 2, 100):
                raise AssertionError("a third one was let in")
            assert (account.requests, account.reserved_bytes) == (2, 100)
        assert (account.requests, account.reserved_bytes) == (1, 80)
        first.add(1000)  # alone
    assert (account.requests, account.reserved_bytes) == (0, 0)


async def test_the_lm_head_is_counted_and_its_frame_is_made_once(owner_of):
    async with owner_of(limits=RequestLimits(lm_heads_per_minute=3)) as owner, owner.raw() as http:
        answers = await asyncio.gather(*(http.get("/v1/lm-head") for _ in range(3)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        owner.now += 20
        refused = await http.get("/v1/lm-head")
        assert_retry_later(refused, "3 LM heads a minute; retry in 40 s")
        second_key = add_client(owner.keys, "another", Quota())
        answer = await http.get("/v1/lm-head", headers={"Authorization": f"Bearer {second_key}"})
        assert answer.content == answers[0].content
        owner.now += 41
        assert (await http.get("/v1/lm-head")).status_code == 200
        assert [method for method, _ in owner.handle.calls].count("lm_head") == 1


async def test_whoever_asked_first_for_the_lm_head_may_go_away(owner_of):
    async with owner_of() as owner, owner.raw() as http:
        http.headers["X-PLM-Fingerprint"] = owner.fingerprint
        assert (await http.get("/v1/model")).status_code == 200
        line = owner.api.state.lines["data owner"][owner.fingerprint]
        fetch = line.lm_head_bytes

        async def cancelled() -> bytes:  # as Serve cancels what a request that ended has begun
            raise asyncio.CancelledError

        line.lm_head_bytes = cancelled
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await http.get("/v1/lm-head")
        line.lm_head_bytes = fetch
        assert (await http.get("/v1/lm-head")).status_code == 200


async def test_an_lm_head_that_could_not_be_fetched_is_fetched_again(owner_of):
    async with owner_of() as owner, owner.raw() as http:
        assert (await http.get("/v1/model")).status_code == 200
        owner.handle.kill("r0")
        assert (await http.get("/v1/lm-head")).status_code == 503
        owner.handle.add()
        assert (await http.get("/v1/lm-head")).status_code == 200


async def test_steps_that_another_plm_refuses_cost_neither_quota_nor_sessions(owner_of, tiny_plm_folder):
    async with owner_of(rows_per_minute=3, sessions=2) as owner, owner.raw() as http:
        assert (await http.post("/v1/sessions/step", content=owner.steps(Step("a", 0, [5])))).status_code == 200
        await owner.replace(tiny_plm_folder("llama", 1))
        for name in "bcd":
            response = await http.post("/v1/sessions/step", content=owner.steps(Step(name, 0, [5, 6], 2)))
            assert response.status_code == 409, response.text
        assert list(account_of(owner).sessions) == ["a"]


async def test_disks_hashes_and_large_frames_keep_the_event_loop_from_nothing(owner_of, monkeypatch):
    on_main: dict[str, set[bool]] = {}

    def watch(owner, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args, **options):
            on_main.setdefault(name, set()).add(threading.current_thread() is threading.main_thread())
            return original(*args, **options)

        monkeypatch.setattr(owner, name, recorded)

    for name in ("decode_extract", "encode_rows", "decode_steps", "encode_stepped"):
        watch(codec, name)
    async with owner_of(limits=RequestLimits(max_body_mb=1)) as owner, owner.raw() as http:
        watch(access_module, "hash_of")
        watch(owner.access, "log")
        watch(owner.access, "_changed_at")
        large = owner.batch(*[[5] * 80] * 230, first=10)
        assert (await http.post("/v1/extract", content=large)).status_code == 200
        steps = [Step(f"{n}", 0, [5] * 85, 85, waits=False) for n in range(8)]
        assert (await http.post("/v1/sessions/step", content=owner.steps(*steps))).status_code == 200
        assert on_main["hash_of"] == on_main["log"] == on_main["_changed_at"] == {False}
        assert on_main["decode_extract"] == on_main["encode_rows"] == {False}
        assert on_main["encode_stepped"] == {
            True,
            False,
        }  # eight answers of 11 kB in the replica, then one of 87 kB
        assert on_main["decode_steps"] == {True}  # 3 kB: read sooner than a thread has begun


async def test_the_audit_file_stays_open_until_it_is_moved_away(owner_of, tmp_path):
    async with owner_of() as owner, owner.raw() as http:
        await http.get("/v1/model")
        first = owner.access._audit_file
        await http.get("/v1/model")
        assert owner.access._audit_file is first
        owner.audit.rename(tmp_path / "yesterday")  # as `logrotate` does
        await http.get("/v1/model")
        assert len((tmp_path / "yesterday").read_text().splitlines()) == 2
        assert [entry["what"] for entry in owner.log()] == ["model"]


async def test_an_audit_log_that_cannot_be_written_ends_nothing_and_is_heard_of(owner_of, caplog):
    async with owner_of() as owner, owner.raw() as http:
        owner.audit.mkdir()
        assert (await http.get("/v1/model")).status_code == 200
        assert "the audit log cannot be written: Is a directory; lost: " in caplog.text
        owner.audit.rmdir()
        assert (await http.get("/v1/model")).status_code == 200
        assert len(owner.log()) == 1


async def test_a_key_is_hashed_once_and_kept_nowhere(owner_of, monkeypatch):
    async with owner_of() as owner, owner.raw() as http:
        for name in "abc":
            add_client(owner.keys, name, Quota())
        hashed: list[str] = []
        monkeypatch.setattr(access_module, "hash_of", lambda key: (hashed.append(key), hash_of(key))[1])
        await http.get("/v1/model")
        assert hashed == [owner.key]
        state = [vars(owner.access), *(vars(account) for account in owner.access._accounts.values())]
        assert owner.key not in str(state)
