"""Two organisations: keys, quotas, fingerprints, certificates and dead lines, over real TLS with the real engine."""

from __future__ import annotations

import asyncio
import pickle
import stat

import httpx
import pytest
import torch
import yaml
from https_kit import Owner, certificate

from pema_ray.data_owner.remote import RemotePLM
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, ExtractBatch, SessionLost, Step, Stepped, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.plm_owner.service.access import Access, Quota, add_client, hash_of
from pema_ray.plm_owner.service.api import RequestLimits


@pytest.fixture
def owner_of(tmp_path, tiny_plm_folder):
    return lambda **settings: Owner(tmp_path, tiny_plm_folder("llama"), **settings)


async def test_states_and_rows_cross_the_line_as_they_are(owner_of, tiny_plm, tiny_client):
    plm = tiny_plm("llama")

    def plain(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return capture_state(plm, input_ids=torch.tensor([ids]), use_cache=False)[0]

    async with owner_of() as owner:
        remote = owner.remote()
        local = tiny_client("llama", max_tokens=90)
        described, expected_answer = await remote.describe(), await local.describe()
        assert described.card == expected_answer.card
        defaults = RequestLimits()
        expected = (90, defaults.max_draft, defaults.max_steps, defaults.max_rows)
        limits = described.limits
        assert (limits.max_tokens, limits.max_draft, limits.max_steps, limits.max_rows) == expected
        bundle = await remote.lm_head()
        assert bundle.to_files() == (await local.lm_head()).to_files()
        shared = ExtractBatch([[5, 6, 7], [9] * 30], [1, 0], tuple(range(20, 40)))
        assert torch.equal(await remote.extract(shared), await local.extract(shared))
        rows = await remote.extract(ExtractBatch([[5, 6, 7, 8], [9, 10]], [1, 0]))
        torch.testing.assert_close(rows, torch.cat([plain([5, 6, 7, 8])[1:], plain([9, 10])]), atol=2e-4, rtol=2e-4)
        opened, lost = await remote.step([Step("a", 0, [5, 6, 7], 2), Step("never", 4, [1])])
        assert isinstance(opened, Stepped) and isinstance(lost, SessionLost)
        torch.testing.assert_close(opened.state_NH, plain([5, 6, 7])[1:], atol=2e-4, rtol=2e-4)
        (drafted,) = await remote.step([Step("a", 3, [8], draft=2)])
        ids = [5, 6, 7, 8, *drafted.drafted]
        torch.testing.assert_close(drafted.state_NH, plain(ids)[3:], atol=2e-4, rtol=2e-4)
        (long,) = await remote.step([Step("b", 0, [5] * 91)])
        assert isinstance(long, UserError) and "91 tokens is longer" in str(long)
        await remote.close(["a", "never"])
        assert (await owner.handle.replicas["r0"].state())["live_sessions"] == 0
        await remote.end()


async def test_who_has_no_key_or_a_wrong_one_gets_401_and_nothing_else(owner_of, tmp_path):
    async with owner_of() as owner:
        wrong = tmp_path / "wrong"
        wrong.write_text("pema-not-the-key")
        for key_file in (None, str(wrong)):
            remote = owner.remote(key_file=key_file)
            with pytest.raises(UserError, match="401: (A key is needed|This key is not known)"):
                await remote.describe()
            await remote.end()
        async with owner.raw() as http:
            for path, method in (("/v1/model", "GET"), ("/v1/lm-head", "GET"), ("/v1/extract", "POST"),
                                 ("/v1/sessions/step", "POST"), ("/v1/sessions/close", "POST")):  # fmt: skip
                for headers in ({"Authorization": ""}, {"Authorization": "Basic x"}, {"Authorization": "Bearer"}):
                    body = "[]" if path.endswith("close") else None
                    response = await http.request(method, path, headers=headers, content=body)
                    assert response.status_code == 401, (path, response.text)
        assert owner.handle.calls == []  # no request reached the PLM
        for file in (None, "nowhere"):
            empty = tmp_path / "empty"
            empty.write_text("\n")
            with pytest.raises(UserError, match="is empty|cannot be read"):
                owner.remote(key_file=str(empty) if file is None else file)


async def test_another_plm_than_the_expected_one_is_refused(owner_of):
    async with owner_of() as owner:
        remote = owner.remote(fingerprint="0" * 16)
        for call in (remote.describe(), remote.extract(ExtractBatch([[5]], [0])), remote.step([Step("a", 0, [5])])):
            with pytest.raises(FingerprintMismatch, match=rf"tiny-llama0 \({owner.fingerprint}\).* '0000000000000000'"):
                await call
        async with owner.raw() as http:
            for path in ("/v1/model", "/v1/lm-head"):
                response = await http.get(path, headers={"X-PLM-Fingerprint": "0" * 16})
                assert response.status_code == 409
                message = response.json()["error"]["message"]
                assert "expect the PLM 0000000000000000; this is tiny-llama0" in message
        assert not owner.api.state.lines
        right = owner.remote(fingerprint=(await owner.remote().describe()).card.fingerprint)
        assert (await right.step([Step("a", 0, [5])]))[0].state_NH.shape[0] == 1


async def test_quotas_are_told_with_the_time_to_come_again(owner_of):
    async with owner_of(rows_per_minute=10, tokens_per_minute=40, sessions=2) as owner:
        remote = owner.remote()
        await remote.extract(ExtractBatch([[5] * 8], [2]))  # 6 rows, 8 tokens
        owner.now += 20
        with pytest.raises(Busy, match="10 rows a minute; retry in 40 s") as raised:
            await remote.extract(ExtractBatch([[5] * 8], [2]))
        assert raised.value.retry_after == 40
        async with owner.raw() as http:
            response = await http.post("/v1/extract", content=owner.batch([5] * 11))
            assert response.status_code == 413 and "11 rows in one request; your quota is 10 a minute" in response.text
        owner.now += 41
        await remote.extract(ExtractBatch([[5] * 8], [2]))
        with pytest.raises(Busy, match="40 tokens a minute"):
            await remote.step([Step("a", 0, [5] * 33)])
        owner.now += 61
        await remote.step([Step("a", 0, [5]), Step("b", 0, [5])])
        await remote.step([Step("a", 1, [5]), Step("b", 1, [5])])
        with pytest.raises(Busy, match="2 sessions at a time"):
            await remote.step([Step("c", 0, [5])])
        await remote.close(["a"])
        await remote.step([Step("c", 0, [5])])
        async with owner.raw() as http:
            response = await http.post("/v1/sessions/step", content=owner.steps(Step("d", 0, [5])))
            assert response.status_code == 429
            assert int(response.headers["Retry-After"]) >= 1
        await remote.end()


async def test_requests_that_are_too_large_or_make_no_sense_are_4xx(owner_of):
    limits = RequestLimits(max_body_mb=0.01, max_steps=3, max_rows=20, max_draft=4)
    async with owner_of(limits=limits) as owner, owner.raw() as http:
        steps = [Step(f"s{i}", 0, [5]) for i in range(4)]
        for path, content, status, words in (
            ("/v1/sessions/step", b"x" * 20_000, 413, "larger than 0.01 MiB"),
            ("/v1/sessions/step", owner.steps(*steps), 413, "4 steps in one message; 3 are allowed"),
            ("/v1/sessions/step", owner.steps(Step("a", 0, [5], draft=9)), 413, "4 drafted tokens"),
            ("/v1/sessions/step", owner.steps(Step("a", 0, [5] * 30, 30)), 413, "At most 20 states"),
            ("/v1/extract", owner.batch([5, 99999]), 422, "99999 is no token"),
            ("/v1/extract", owner.batch([5] * 30), 413, "30 rows in one request"),
            ("/v1/extract", owner.batch([5] * 91, first=90), 422, "is longer than"),
            ("/v1/extract", b"", 400, "0 bytes are no frame"),
            ("/v1/extract", pickle.dumps({"a": 1}), 400, "do not begin as a frame"),
            ("/v1/sessions/step", owner.steps(), 200, ""),
        ):
            response = await http.post(path, content=content)
            assert response.status_code == status, (words, response.text)
            assert words in (response.json()["error"]["message"] if status != 200 else "")
        for content in ("{}", "[1]", '[""]', "[", '["' + "x" * 201 + '"]'):
            response = await http.post(
                "/v1/sessions/close", content=content, headers={"Content-Type": "application/json"}
            )
            assert response.status_code == 400, content
        assert (await http.get("/v1/nothing")).status_code == 404
        assert (await http.get("/healthz")).json() == {"ready": True}


async def test_an_expired_or_unknown_certificate_is_refused(owner_of, tmp_path):
    async with owner_of(days=-1) as owner:
        with pytest.raises(UserError, match="certificate is not trusted: .*expired"):
            await owner.remote().describe()
        foreign, _ = certificate(tmp_path, "other")
        with pytest.raises(UserError, match="certificate is not trusted"):
            await owner.remote(ca_file=foreign).describe()
    with pytest.raises(UserError, match="ca_file=nowhere: cannot be read"):
        RemotePLM(PLMConfig(url="https://127.0.0.1:1", ca_file="nowhere"))


async def test_a_dead_line_is_a_connection_error_in_bounded_time(owner_of):
    async with owner_of() as owner:
        await owner.remote().describe()
    remote = owner.remote(timeout_seconds=1.0)
    started = asyncio.get_running_loop().time()
    with pytest.raises(ConnectionError, match=owner.url):
        await remote.step([Step("a", 0, [5])])
    assert asyncio.get_running_loop().time() - started < 5


async def test_the_audit_log_says_who_did_how_much_and_nothing_of_what(owner_of):
    async with owner_of() as owner:
        remote = owner.remote()
        await remote.step([Step("secret-session", 0, [77, 78, 79], 2)])
        async with owner.raw() as http:
            await http.get("/v1/model", headers={"X-Request-Id": "mine", "Authorization": "Bearer wrong"})
            response = await http.get("/v1/model", headers={"X-Request-Id": "x" * 65})
            assert response.headers["X-Request-Id"].isalnum()
        asked_first, first, second, third = owner.log()
        assert (asked_first["what"], asked_first["status"]) == ("model", 200)
        assert {k: first[k] for k in ("client", "what", "status", "sessions", "rows", "tokens")} == {
            "client": "data owner", "what": "step", "status": 200, "sessions": 1, "rows": 2, "tokens": 3,
        }  # fmt: skip
        assert (second["client"], second["status"], second["id"]) == ("", 401, "mine")
        assert third["status"] == 200
        text = owner.audit.read_text()
        assert owner.key not in text and "secret-session" not in text
        counts = {"id", "client", "what", "status", "seconds", "time", "sessions", "rows", "tokens"}
        counts |= {"received_bytes", "sent_bytes"}
        assert all(entry.keys() <= counts for entry in owner.log())


async def test_another_plm_that_takes_its_place_in_mid_answer_gives_no_states(owner_of, tiny_plm_folder):
    async with owner_of() as owner:
        remote, before = owner.remote(), owner.fingerprint
        assert isinstance((await remote.step([Step("a", 0, [5], draft=2)]))[0], Stepped)
        await owner.replace(tiny_plm_folder("llama", 1))  # the same architecture and tokenizer: its states would do
        for step in (Step("a", 3, [5]), Step("a", 0, [5, 6])):
            with pytest.raises(FingerprintMismatch, match=rf"plm.url=.*tiny-llama\d+ \(.*uses PLM '{before}'"):
                await remote.step([step])
        with pytest.raises(FingerprintMismatch):
            await remote.extract(ExtractBatch([[5]], [0]))
        with pytest.raises(FingerprintMismatch):
            await remote.lm_head()
        newer = owner.remote()
        card = (await newer.describe()).card
        assert card.name.startswith("tiny-llama") and card.fingerprint != before
        assert (await newer.lm_head()).card == card
        assert isinstance((await newer.step([Step("b", 0, [5])]))[0], Stepped)
        await owner.replace(tiny_plm_folder("llama"))  # the old one comes back
        assert isinstance((await remote.step([Step("a", 0, [5])]))[0], Stepped)


async def test_fingerprints_that_are_made_up_are_not_remembered(owner_of, tiny_plm_folder):
    async with owner_of() as owner, owner.raw() as http:
        for number in range(20):
            frame = codec.encode_steps([Step("a", 0, [5])], f"{number:016}")
            assert (await http.post("/v1/sessions/step", content=frame)).status_code == 409
        assert not owner.api.state.lines
        for seed in range(6):
            await owner.replace(tiny_plm_folder("llama", seed % 3))
            await owner.remote().step([Step("a", 0, [5])])
        assert {name: len(lines) for name, lines in owner.api.state.lines.items()} == {"data owner": 3}


async def test_many_steps_go_in_messages_that_the_plm_owner_takes(owner_of):
    async with owner_of(limits=RequestLimits(max_steps=3, max_rows=8)) as owner:
        steps = [Step(f"s{i}", 0, [5, 6, 7], 3) for i in range(7)]
        answers = await owner.remote().step(steps)
        assert [len(answer.state_NH) for answer in answers] == [3] * 7
        sizes = [entry["sessions"] for entry in owner.log() if entry["what"] == "step"]
        assert sorted(sizes) == [1, 2, 2, 2]


async def test_steps_beyond_a_quota_of_tokens_are_busy_for_a_while_and_never_too_large(owner_of):
    async with owner_of(tokens_per_minute=7) as owner:
        plm = owner.remote()
        answers = await plm.step([Step(f"s{i}", 0, [5, 6, 7]) for i in range(5)])
        assert [type(answer) for answer in answers].count(Stepped) == 2
        assert all(isinstance(answer, Stepped | Busy) for answer in answers)
        owner.now += 60
        (answer,) = await plm.step([Step("s9", 0, [5, 6, 7])])
        assert isinstance(answer, Stepped)


@pytest.mark.parametrize("limits", [{"max_rows": 20}, {"max_body_mb": 0.0117}, {"max_rows": 7}])
async def test_a_batch_beyond_the_limits_goes_in_several_requests(owner_of, tiny_client, limits):
    random = torch.Generator().manual_seed(0)
    lengths = [1, 40, 3, 60, 22, 2, 1, 50] * 12
    sequences = [torch.randint(3, 300, (n,), generator=random).tolist() for n in lengths]
    batch = ExtractBatch(sequences, [n // 2 for n in lengths], tuple(range(20, 40)))
    async with owner_of(limits=RequestLimits(**limits)) as owner:
        rows = await owner.remote().extract(batch)
        torch.testing.assert_close(rows, await tiny_client("llama").extract(batch), atol=2e-4, rtol=2e-4)
        requests = [entry for entry in owner.log() if entry["what"] == "extract"]
        assert len(requests) > 1
        assert {entry["status"] for entry in requests} == {200}
        assert sum(entry["rows"] for entry in requests) == batch.rows


async def test_a_batch_beyond_the_quota_waits_for_it_between_its_requests(owner_of, tiny_client, monkeypatch):
    """To begin the batch again would use the quota up again, and never come to its end."""
    async with owner_of(rows_per_minute=10) as owner:
        waited = []

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            owner.now += seconds

        monkeypatch.setattr("pema_ray.data_owner.remote.sleep", sleep)
        batch = ExtractBatch([list(range(3, 3 + n)) for n in (8, 25, 3)], [0, 0, 0])
        rows = await owner.remote().extract(batch)
        torch.testing.assert_close(rows, await tiny_client("llama").extract(batch), atol=2e-4, rtol=2e-4)
        assert waited == [60.0] * 3
        with pytest.raises(Busy, match="10 rows a minute"):  # its first request: the caller may do something else
            await owner.remote().extract(ExtractBatch([[5] * 8], [0]))


async def test_a_batch_of_more_tokens_than_a_minutes_quota_goes_in_several_requests(owner_of, tiny_client, monkeypatch):
    async with owner_of(tokens_per_minute=40) as owner:

        async def sleep(seconds: float) -> None:
            owner.now += seconds

        monkeypatch.setattr("pema_ray.data_owner.remote.sleep", sleep)
        batch = ExtractBatch([list(range(3, 3 + n)) for n in (8, 25, 3, 28)], [0, 20, 0, 27], tuple(range(50, 62)))
        rows = await owner.remote().extract(batch)
        torch.testing.assert_close(rows, await tiny_client("llama").extract(batch), atol=2e-4, rtol=2e-4)
        answered = [entry for entry in owner.log() if entry["what"] == "extract" and entry["status"] == 200]
        assert [entry["tokens"] for entry in answered] == [12 + 8, 12 + 25 + 3, 12 + 28]


def answering(model: object) -> RemotePLM:
    """A client of a service that describes itself so."""
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, json=model))
    return RemotePLM(PLMConfig(url="https://plm.example.org"), transport=transport)


MODEL = {
    "name": "a", "fingerprint": "f", "hidden_size": 4, "vocab_size": 9, "max_positions": 90, "eos_token_ids": [1],
    "max_session_tokens": 80, "max_sessions": 8,
    "limits": {"max_steps": 3, "max_rows": 8, "max_draft": 0, "max_body_mb": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [[], {}, {**MODEL, "max_session_tokens": 0}, {**MODEL, "eos_token_ids": ["1"]}, {**MODEL, "hidden_size": "4"}]
    + [{**MODEL, "limits": {**MODEL["limits"], name: value}} for name, value in
       (("max_rows", 0), ("max_steps", -1), ("max_draft", None), ("max_body_mb", 0), ("max_rows", 1e99))],
)  # fmt: skip
async def test_a_service_that_describes_itself_badly_is_none(wrong):
    described = await answering(MODEL).describe()
    assert (described.limits.max_tokens, described.limits.max_rows) == (80, 8)
    with pytest.raises(UserError, match=r"https://plm.example.org: is no PLM owner's service: "):
        await answering(wrong).describe()


async def test_a_session_that_is_closed_while_it_opens_leaves_no_slot_behind(owner_of):
    async with owner_of(sessions=1) as owner:
        remote = owner.remote()
        await remote.step([Step("warm", 0, [5])])
        await remote.close(["warm"])
        for number in range(3):
            opening = asyncio.create_task(remote.step([Step(f"s{number}", 0, [5] * 80)]))
            await asyncio.sleep(0.005)
            await remote.close([f"s{number}"])
            await asyncio.gather(opening, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert (await owner.handle.replicas["r0"].state())["live_sessions"] == 0


async def test_keys_that_change_count_from_the_next_request_on(owner_of):
    async with owner_of(rows_per_minute=7) as owner:
        renewed = add_client(owner.keys, "data owner", Quota(sessions=5))
        with pytest.raises(UserError, match="401"):
            await owner.remote().describe()
        owner.key_file.write_text(renewed)
        headers = {"Authorization": f"Bearer {renewed}"}
        async with owner.raw() as http:
            quota = (await http.get("/v1/model", headers=headers)).json()["quota"]
            assert quota == {"rows_per_minute": 7, "sessions": 5}  # unchanged quotas stay
            owner.keys.write_text("[")  # broken: the known keys stay valid
            assert (await http.get("/v1/model", headers=headers)).json()["quota"] == quota


def test_keys_are_kept_as_hashes_in_a_file_of_ones_own(tmp_path):
    keys = tmp_path / "deep" / "keys.yaml"
    first = add_client(keys, "a", Quota(sessions=3))
    second = add_client(keys, "b", Quota())
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert first not in keys.read_text() and hash_of(first) in keys.read_text()
    access = Access(keys)
    assert access.account(f"Bearer {first}").client.quota.sessions == 3
    renewed = add_client(keys, "a", Quota())
    access.reload()
    assert access.account(f"Bearer {renewed}").client.name == "a"
    assert access.account(f"bearer {second}").client.name == "b"
    from pema_ray.plm_owner.service.access import Refused

    with pytest.raises(Refused):
        access.account(f"Bearer {first}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("clients: [{name: a, key_sha256: short}]", "64 hexadecimal digits"),
        ("clients: [{name: a}]", "key_sha256"),
        ("client: []", "unknown key 'client'"),
        ("[", "cannot be read"),
    ],
)
def test_a_broken_file_of_keys_is_refused(tmp_path, content, problem):
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"keys.yaml.*{problem}"):
        Access(path)
    with pytest.raises(UserError, match="keys.yaml: cannot be read: No such file"):
        Access(tmp_path / "gone" / "keys.yaml")
    duplicates = {"clients": [{"name": "a", "key_sha256": "0" * 64}, {"name": "b", "key_sha256": "0" * 64}]}
    path.write_text(yaml.safe_dump(duplicates))
    with pytest.raises(UserError, match="the same key_sha256"):
        Access(path)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (404, b"Path '/v1/model' not found. Ping http://.../-/routes for available routes.", Busy),
        (500, b"Internal Server Error", Busy),
        (404, b'{"error": {"message": "Not Found", "type": "line_error"}}', UserError),
        (400, b'{"error": {"message": "bad", "type": "line_error"}}', UserError),
    ],
)
async def test_a_proxy_whose_application_restarts_is_waited_for(status, body, error):
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body))
    remote = RemotePLM(PLMConfig(url="https://plm.example.org"), transport=transport)
    with pytest.raises(error):
        await remote.describe()
    await remote.end()


@pytest.mark.parametrize("key", ["two words", "two\nlines", "schlüssel", ""])
def test_a_file_that_holds_no_key_is_named(tmp_path, key):
    (tmp_path / "key").write_text(key)
    with pytest.raises(UserError, match="plm.key_file=.*key"):
        RemotePLM(PLMConfig(url="https://plm.example.org", key_file=str(tmp_path / "key")))


async def test_work_that_was_not_done_is_not_counted(owner_of):
    async with owner_of(rows_per_minute=100) as owner:
        remote = owner.remote()
        for _ in range(30):  # of 10 rows each, for sessions that are not there
            (outcome,) = await remote.step([Step("nobody", 5, list(range(3, 13)), states=10)])
            assert isinstance(outcome, SessionLost)
        (outcome,) = await remote.step([Step("me", 0, list(range(3, 13)), states=10)])
        assert isinstance(outcome, Stepped)
