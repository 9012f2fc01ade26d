"""Two Ray clusters in two network namespaces, each with its own owner's files alone, joined by HTTPS and a key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from api_kit import offline_texts, save_adapter
from https_kit import certificate
from safetensors.torch import load_file

from pema_ray.plm_owner.service.access import Quota, add_client

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("organisation.py")
OWNERS = ("plm", "data")
TEXT = b'{"source": "a pair that only the data owner has", "target": "sixteen words of its own"}'
MAX_TOKENS, ROWS = 25, 5000  # of an answer; per minute


class Network:
    """Two organisations on this machine: in a network namespace each, with a wire between, or at two addresses.

    Args:
        names: the namespaces; none: there are only addresses.
    """

    def __init__(self, names: dict[str, str] | None) -> None:
        self._names = names
        self.address = (
            {"plm": "10.77.31.1", "data": "10.77.31.2"} if names else {"plm": "127.77.31.1", "data": "127.77.31.2"}
        )
        self.node = self.address if names else dict.fromkeys(OWNERS, "127.0.0.1")

    def within(self, owner: str) -> list[str]:
        """The prefix of a command that runs in an owner's network."""
        return ["ip", "netns", "exec", self._names[owner]] if self._names else []

    def processes(self, owner: str, pid: int) -> list[int]:
        """All processes of an owner; `pid` is the first."""
        if self._names:
            pids = run("ip", "netns", "pids", self._names[owner])
            return [int(pid) for pid in pids.split()]
        if not psutil.pid_exists(pid):
            return []
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]

    def cut(self, organisation: Organisation) -> None:
        """Cut the line."""
        if self._names:
            run("ip", "-n", self._names["plm"], "link", "set", "pv0", "down")
        else:
            organisation.end()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=["namespaces", "addresses"])
def network(request) -> Iterator[Network]:
    """A namespace for each organisation and a wire between them, where root allows; two addresses everywhere."""
    if request.param == "addresses":
        yield Network(None)
        return
    names = {owner: f"pema-{owner}-{os.getpid()}" for owner in OWNERS}
    created: list[str] = []
    try:
        try:
            for name in names.values():
                run("ip", "netns", "add", name)
                created.append(name)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("network namespaces need root and iproute2")
        run("ip", "link", "add", "pv0", "netns", names["plm"], "type", "veth", "peer", "pv1", "netns", names["data"])
        network = Network(names)
        for owner, device in (("plm", "pv0"), ("data", "pv1")):
            inside = ("ip", "-n", names[owner])
            run(*inside, "addr", "add", f"{network.address[owner]}/24", "dev", device)
            run(*inside, "link", "set", device, "up")
            run(*inside, "link", "set", "lo", "up")
        yield network
    finally:
        for name in created:
            subprocess.run(["ip", "netns", "del", name], check=False)


class Organisation:
    """A cluster of its own, with a home and a working folder of its own."""

    def __init__(self, network: Network, owner: str, folder: Path, settings: dict) -> None:
        self.folder, self._network, self._owner = folder, network, owner
        place = {"address": network.address[owner], "node": network.node[owner]}
        settings = {**settings, **place, "temporary": str(folder / "r")}
        environment = {
            **os.environ, "HOME": str(folder), "TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [*network.within(owner), sys.executable, str(SCRIPT), json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "err").open("w"), text=True,
            cwd=folder, env=environment,
        )  # fmt: skip

    def wait(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "up":
                return
        raise AssertionError((self.folder / "err").read_text()[-3000:])

    def processes(self) -> list[int]:
        return self._network.processes(self._owner, self.process.pid)

    def end(self) -> None:
        assert self.process.stdin is not None
        left = self.processes()
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for pid in {*left, *self.processes()}:
            if pid != self.process.pid and psutil.pid_exists(pid):
                psutil.Process(pid).kill()


def holders(pids: list[int], secret: bytes) -> list[int]:
    """Processes whose memory holds these bytes."""
    holding = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
                for line in maps:
                    addresses, rights, *_ = line.split()
                    if not rights.startswith("rw"):
                        continue
                    begin, end = (int(part, 16) for part in addresses.split("-"))
                    try:
                        memory.seek(begin)
                        left = end - begin
                        tail = b""
                        while left:
                            block = memory.read(min(left, 2**26))
                            if not block:
                                break
                            if secret in tail + block:
                                holding.append(pid)
                                left = 0
                                break
                            left -= len(block)
                            tail = block[-len(secret) :]
                    except (OSError, ValueError):
                        continue
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(set(holding))


def files_with(folder: Path, secret: bytes) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and secret in p.read_bytes()]


REFUSALS = """
import json, pickle, sys, ssl, httpx
from pema_ray.line import ExtractBatch, codec
url, ca, key, quota, fingerprint = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
trusted = ssl.create_default_context(cafile=ca)
def ask(name, path="/v1/extract", content=b"", verify=trusted, **headers):
    headers = {"Authorization": f"Bearer {key}", **headers}
    try:
        with httpx.Client(base_url=url, verify=verify, timeout=30) as http:
            response = http.post(path, content=content, headers=headers)
            refusals[name] = response.status_code, response.text, response.headers.get("retry-after", "")
    except httpx.HTTPError as error:
        refusals[name] = type(error).__name__, str(error), ""
refusals = {}
ask("wrong key", Authorization="Bearer pema-wrong")
def frame(count, fingerprint=fingerprint):
    return codec.encode_extract(ExtractBatch([[5] * 80] * count, [0] * count), fingerprint)
ask("wrong fingerprint", content=frame(1, "0" * 16))
ask("a pickle", content=pickle.dumps({"a": 1}))
ask("no certificate of its own", verify=True)
ask("over quota", content=frame(quota // 80 + 1))
ask("nearly all", content=frame(quota // 80 - 1))
ask("over quota, in all", content=frame(quota // 80 - 1))
print(json.dumps(refusals))
"""


def refusals(network: Network, url: str, folder: Path, key: str, fingerprint: str) -> dict[str, tuple]:
    """The PLM owner's answers to the data owner's faulty requests, from the data owner's network."""
    command = [*network.within("data"), sys.executable, "-c", REFUSALS]
    command += [url, str(folder / "ca.crt"), key, str(ROWS), fingerprint]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def test_each_organisation_keeps_its_own(network, tiny_plm_folder, tiny_source):
    base = Path(tempfile.mkdtemp(prefix="po", dir="/tmp"))
    folders = {owner: base / owner for owner in OWNERS}
    for folder in folders.values():
        folder.mkdir()
    source = tiny_source("llama")
    card = source.describe().card
    save_adapter(card, folders["data"] / "adapter")
    shutil.copytree(tiny_plm_folder("llama"), folders["plm"] / "plm")
    crt, private = certificate(folders["plm"], "server", address=network.address["plm"])
    shutil.copy(crt, folders["data"] / "ca.crt")
    key = add_client(folders["plm"] / "keys.yaml", "them", Quota(rows_per_minute=ROWS))
    (folders["data"] / "key").write_text(key)
    (folders["data"] / "train.jsonl").write_bytes(TEXT)
    url = f"https://{network.address['plm']}:8443"
    organisations: dict[str, Organisation] = {}
    try:
        organisations["plm"] = Organisation(
            network, "plm", folders["plm"],
            {
                "import_path": "pema_ray.plm_owner.service.application:plm_owner", "port": 8443,
                "tls": {"ssl_certfile": crt, "ssl_keyfile": private},
                "args": {
                    "plm": {"name": str(folders["plm"] / "plm"), "dtype": "float32", "device": "cpu"},
                    "engine": {"slots": 4, "max_tokens": 90}, "keys": str(folders["plm"] / "keys.yaml"),
                    "audit": str(folders["plm"] / "audit.jsonl"), "plm_owner": {"cpus": 0.1}, "api_cpus": 0.1,
                },
            },
        )  # fmt: skip
        organisations["plm"].wait()
        organisations["data"] = Organisation(
            network, "data", folders["data"],
            {
                "import_path": "pema_ray.pema.serving.data_owner:data_owner", "port": 8001,
                "args": {
                    "plm": {"url": url, "key_file": str(folders["data"] / "key"), "fingerprint": card.fingerprint,
                             "ca_file": str(folders["data"] / "ca.crt"), "timeout_seconds": 10},
                    "decoder": {"lambda_max": 0.7, "timeout_seconds": 8, "dtype": "float32"},
                    "data_owner": {"cpus": 0.1},
                    "live": {"adapters": {"mine": str(folders["data"] / "adapter")}},
                },
            },
        )  # fmt: skip
        organisations["data"].wait()

        wire = f"http://{network.address['data']}:8001/v1"
        prompt = "Rewrite each Bible verse"
        ask = (
            "import openai, sys; c = openai.OpenAI(base_url=sys.argv[1], api_key='x', max_retries=0, timeout=60)\n"
            "try: print(c.completions.create(model='mine', prompt=sys.argv[2], max_tokens=int(sys.argv[3]),"
            " temperature=0).choices[0].text, end='')\n"
            "except openai.APIStatusError as e: print('status', e.status_code, end='')"
        )

        def ask_service() -> str:
            command = [*network.within("data"), sys.executable, "-c", ask, wire, prompt, str(MAX_TOKENS)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        assert [ask_service()] == offline_texts(source, folders["data"] / "adapter", [prompt], MAX_TOKENS, 0.7)

        weights = load_file(folders["plm"] / "plm" / "model.safetensors")
        layer = next(name for name in weights if "mlp" in name)
        weight = weights[layer].float().numpy().tobytes()[:64]
        learned = load_file(folders["data"] / "adapter" / "adapter_model.safetensors")["A"].numpy().tobytes()[:64]
        at = {owner: organisations[owner].processes() for owner in OWNERS}
        assert holders(at["plm"], weight)  # the search finds what is there
        assert holders(at["data"], learned)
        assert not holders(at["data"], weight)
        assert not holders(at["plm"], learned)
        assert not files_with(folders["data"], weight)
        assert not files_with(folders["plm"], learned)
        assert not files_with(folders["plm"], prompt.encode())
        assert not files_with(folders["plm"], TEXT)
        assert not holders(at["plm"], TEXT)
        assert not files_with(folders["plm"], key.encode())
        refused = refusals(network, url, folders["data"], key, card.fingerprint)
        assert refused["wrong key"][0] == 401
        assert refused["wrong fingerprint"][0] == 409 and card.fingerprint in refused["wrong fingerprint"][1]
        assert refused["over quota"][0] == 413  # more than a minute's rows in one request
        assert refused["over quota, in all"][0] == 429 and int(refused["over quota, in all"][2]) >= 1
        assert refused["a pickle"][0] == 400
        assert refused["no certificate of its own"][0] == "ConnectError"  # the system's authorities do not know it

        audit = [json.loads(line) for line in (folders["plm"] / "audit.jsonl").read_text().splitlines()]
        assert {entry["client"] for entry in audit} == {"them", ""}  # nobody: of the wrong key
        assert {"model", "lm-head", "step"} <= {entry["what"] for entry in audit}

        network.cut(organisations["plm"])
        started = time.monotonic()
        assert ask_service().startswith("status 503")
        assert time.monotonic() - started < 40  # `timeout_seconds` of the answer, and what a new process costs
    finally:
        for organisation in organisations.values():
            if organisation.process.poll() is None:
                organisation.end()
        shutil.rmtree(base, ignore_errors=True)
