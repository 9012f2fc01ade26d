"""Two organisations: keys, quotas, fingerprints, certificates and dead lines, over real TLS with the real engine."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import pickle
import stat
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from serving_kit import DirectHandle

from pema_ray.data_owner.remote import RemoteConfig, RemotePLM
from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, SessionLost, codec
from pema_ray.line.stepping import Busy, Step, Stepped
from pema_ray.plm_owner.access import Access, Quota, add_client, hash_of
from pema_ray.plm_owner.api import Limits, make_api
from pema_ray.plm_owner.replicas import Replicas
from pema_ray.plm_owner.service import PLMEngine
from pema_ray.plm_owner.states import capture_state


def certificate(folder: Path, name: str, days: int = 1, address: str = "127.0.0.1") -> tuple[str, str]:
    """A self-signed certificate of an address and its key; with negative days it has expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pema-ray test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return str(paths[0]), str(paths[1])


class Owner:
    """A PLM owner's public service on a port of this machine."""

    def __init__(self, folder: Path, plm: str, days: int = 1, limits: Limits | None = None, **quota) -> None:
        self.folder = folder
        self.keys, self.audit = folder / "keys.yaml", folder / "audit.jsonl"
        self.key_file = folder / "key"
        self.key = add_client(self.keys, "data owner", Quota(**quota))
        self.key_file.write_text(self.key + "\n")
        self.certificate, self._private = certificate(folder, "server", days)
        config = {"name": plm, "dtype": "float32", "device": "cpu", "threads": 1}
        self.handle = DirectHandle(lambda: PLMEngine(config, {"slots": 8, "max_tokens": 90}))
        self.now, self._remotes = 1000.0, list[RemotePLM]()
        self.access = Access(self.keys, self.audit, clock=lambda: self.now)
        self.api = make_api(self.access, limits or Limits(), lambda name: Replicas(self.handle, name))

    async def __aenter__(self) -> Owner:
        config = uvicorn.Config(
            self.api, port=0, log_level="critical", ssl_certfile=self.certificate, ssl_keyfile=self._private
        )
        self.server = uvicorn.Server(config)
        self._task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.url = f"https://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        for remote in self._remotes:
            await remote.end()
        self.server.should_exit = True
        await self._task

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for replica in self.handle.replicas.values():
            await (await replica._engine()).stop()

    def restart(self) -> None:
        """As when the service is deployed anew: nothing is remembered of the PLM."""
        self.api.state.lines.clear()

    def remote(self, **changes) -> RemotePLM:
        settings = {"url": self.url, "key_file": str(self.key_file), "ca_file": self.certificate, "timeout_seconds": 20}
        self._remotes.append(RemotePLM(RemoteConfig(**(settings | changes))))
        return self._remotes[-1]

    def raw(self) -> httpx.AsyncClient:
        import ssl

        trusted = ssl.create_default_context(cafile=self.certificate)
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, verify=trusted, headers=headers, timeout=20)

    def log(self) -> list[dict]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()] if self.audit.exists() else []


@pytest.fixture
def owner_of(tmp_path, tiny_plm_folder):
    return lambda **settings: Owner(tmp_path, tiny_plm_folder("llama"), **settings)


async def test_states_and_rows_cross_the_line_as_they_are(owner_of, tiny_plm, tiny_source):
    plm = tiny_plm("llama")

    def plain(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return capture_state(plm, input_ids=torch.tensor([ids]), use_cache=False)[0]

    async with owner_of() as owner:
        remote = owner.remote()
        assert await remote.describe() == tiny_source("llama").describe()
        bundle = await remote.lm_head()
        assert torch.equal(bundle.head.weight, tiny_source("llama").lm_head().head.weight)
        assert bundle.tokenizer()("Rewrite").input_ids == plm.tokenizer("Rewrite").input_ids
        batch = ExtractBatch([[5, 6, 7, 8], [9, 10]], [1, 0])
        rows = await remote.extract(batch)
        torch.testing.assert_close(rows, torch.cat([plain([5, 6, 7, 8])[1:], plain([9, 10])]), atol=2e-4, rtol=2e-4)
        opened, lost = await remote.step([Step("a", 0, [5, 6, 7], 2), Step("never", 4, [1])])
        assert isinstance(opened, Stepped) and isinstance(lost, SessionLost)
        torch.testing.assert_close(opened.state_NH, plain([5, 6, 7])[1:], atol=2e-4, rtol=2e-4)
        (drafted,) = await remote.step([Step("a", 3, [8], draft=2)])
        whole = [5, 6, 7, 8, *drafted.drafted]
        torch.testing.assert_close(drafted.state_NH, plain(whole)[3:], atol=2e-4, rtol=2e-4)
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
                    got = await http.request(method, path, headers=headers, content=body)
                    assert got.status_code == 401, (path, got.text)
        assert owner.handle.calls == []  # nobody came as far as the PLM
        for file in (None, "nowhere"):
            empty = tmp_path / "empty"
            empty.write_text("\n")
            with pytest.raises(UserError, match="is empty|cannot be read"):
                owner.remote(key_file=str(empty) if file is None else file)


async def test_another_plm_than_the_expected_one_is_refused(owner_of):
    async with owner_of() as owner:
        remote = owner.remote(fingerprint="0" * 16)
        with pytest.raises(UserError, match="409: You expect the PLM 0000000000000000; this is"):
            await remote.describe()
        right = owner.remote(fingerprint=(await owner.remote().describe()).fingerprint)
        assert (await right.step([Step("a", 0, [5])]))[0].state_NH.shape[0] == 1


async def test_quotas_are_told_with_the_time_to_come_again(owner_of):
    async with owner_of(rows_per_minute=10, tokens_per_minute=40, sessions=2) as owner:
        remote = owner.remote()
        await remote.extract(ExtractBatch([[5] * 8], [2]))  # 6 rows, 8 tokens
        owner.now += 20
        with pytest.raises(Busy, match="10 rows a minute; come again in 40 s") as raised:
            await remote.extract(ExtractBatch([[5] * 8], [2]))
        assert raised.value.retry_after == 40
        with pytest.raises(UserError, match="413: 11 rows in one request; your quota is 10 a minute"):
            await remote.extract(ExtractBatch([[5] * 11], [0]))
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
            got = await http.post("/v1/sessions/step", content=codec.encode_steps([Step("d", 0, [5])]))
            assert got.status_code == 429
            assert int(got.headers["Retry-After"]) >= 1
        await remote.end()


async def test_requests_that_are_too_large_or_make_no_sense_are_4xx(owner_of):
    limits = Limits(max_body_mb=0.01, max_steps=3, max_rows=20, max_draft=4)
    async with owner_of(limits=limits) as owner, owner.raw() as http:
        steps = [Step(f"s{i}", 0, [5]) for i in range(4)]
        for path, content, status, words in (
            ("/v1/sessions/step", b"x" * 20_000, 413, "larger than 0.01 MiB"),
            ("/v1/sessions/step", codec.encode_steps(steps), 413, "4 steps in one message; 3 are allowed"),
            ("/v1/sessions/step", codec.encode_steps([Step("a", 0, [5], draft=9)]), 413, "4 drafted tokens"),
            ("/v1/sessions/step", codec.encode_steps([Step("a", 0, [5] * 30, 30)]), 413, "At most 20 states"),
            ("/v1/sessions/step", codec.encode_steps([Step("a", 0, [5, 99999])]), 422, "99999 is no token"),
            ("/v1/extract", codec.encode_extract(ExtractBatch([[5] * 30], [0])), 413, "30 rows in one request"),
            ("/v1/extract", codec.encode_extract(ExtractBatch([[5] * 91], [90])), 422, "is longer than"),
            ("/v1/extract", b"", 400, "0 bytes are no frame"),
            ("/v1/extract", pickle.dumps({"a": 1}), 400, "do not begin as a frame"),
            ("/v1/sessions/step", codec.encode_steps([]), 200, ""),
        ):
            got = await http.post(path, content=content)
            if path == "/v1/extract" and "longer" in words:
                assert got.status_code in (200, 422)  # this PLM's own limit is 96
                continue
            assert got.status_code == status, (words, got.text)
            assert words in (got.json()["error"]["message"] if status != 200 else "")
        for content in ("{}", "[1]", '[""]', "[", '["' + "x" * 201 + '"]'):
            got = await http.post("/v1/sessions/close", content=content, headers={"Content-Type": "application/json"})
            assert got.status_code == 400, content
        assert (await http.get("/v1/nothing")).status_code == 404
        assert (await http.get("/healthz")).json() == {"ready": True}


async def test_an_expired_or_unknown_certificate_is_refused(owner_of, tmp_path):
    async with owner_of(days=-1) as owner:
        with pytest.raises(UserError, match="certificate is not trusted: .*expired"):
            await owner.remote().describe()
        other, _ = certificate(tmp_path, "other")
        with pytest.raises(UserError, match="certificate is not trusted"):
            await owner.remote(ca_file=other).describe()
    with pytest.raises(UserError, match="ca_file=nowhere: cannot be read"):
        RemotePLM(RemoteConfig(url="https://127.0.0.1:1", ca_file="nowhere"))


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
            got = await http.get("/v1/model", headers={"X-Request-Id": "x" * 65})
            assert got.headers["X-Request-Id"].isalnum()
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
        assert all(entry.keys() <= counts for entry in owner.log())


async def test_another_plm_in_its_place_is_noticed_at_the_next_step(owner_of, tiny_plm_folder):
    async with owner_of() as owner:
        remote = owner.remote()
        await remote.step([Step("a", 0, [5])])
        config = {"name": tiny_plm_folder("qwen2"), "dtype": "float32", "device": "cpu", "threads": 1}
        owner.handle._make = lambda: PLMEngine(config, {"slots": 8})
        owner.handle.kill("r0")
        owner.handle.add()
        owner.restart()
        with pytest.raises(UserError, match="409: You expect the PLM"):
            await remote.step([Step("a", 1, [5])])


async def test_many_steps_go_in_messages_that_the_plm_owner_takes(owner_of):
    async with owner_of(limits=Limits(max_steps=3, max_rows=8)) as owner:
        steps = [Step(f"s{i}", 0, [5, 6, 7], 3) for i in range(7)]
        answers = await owner.remote().step(steps)
        assert [len(answer.state_NH) for answer in answers] == [3] * 7
        sizes = [entry["sessions"] for entry in owner.log() if entry["what"] == "step"]
        assert sorted(sizes) == [1, 2, 2, 2]


async def test_a_batch_of_uneven_texts_is_cut_into_passes(owner_of):
    batch = ExtractBatch([[5]] * 30 + [list(range(3, 60))] + [[6, 7]] * 10, [0] * 41)
    async with owner_of() as owner:
        replica = owner.handle.replicas["r0"]
        replica.config = replica.config.model_copy(update={"extract_tokens": 64})
        shapes = []
        whole = await owner.remote().extract(batch)
        extract = replica._source.extract

        def counted(piece: ExtractBatch) -> torch.Tensor:
            shapes.append((len(piece.token_ids), max(map(len, piece.token_ids))))
            return extract(piece)

        replica._source.extract = counted
        again = await owner.remote().extract(batch)
        torch.testing.assert_close(again, whole, atol=2e-4, rtol=2e-4)
        assert len(shapes) > 2
        assert all(count == 1 or count * longest <= 64 for count, longest in shapes)


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
        told = await owner.remote().limits()
        assert told["quota"] == {"rows_per_minute": 7, "sessions": 5}  # what was not said anew stays
        owner.keys.write_text("[")  # broken: who was known stays known
        assert (await owner.remote().limits())["quota"] == told["quota"]


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
    from pema_ray.plm_owner.access import Refused

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
    twice = {"clients": [{"name": "a", "key_sha256": "0" * 64}, {"name": "b", "key_sha256": "0" * 64}]}
    path.write_text(yaml.safe_dump(twice))
    with pytest.raises(UserError, match="the same key_sha256"):
        Access(path)
