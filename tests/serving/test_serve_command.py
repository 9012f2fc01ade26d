"""`serve run` and `serve deploy` themselves, with the files of serve_configs/, as the docs say; asked over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from api_kit import offline_texts, save_adapter
from test_line_over_https import certificate
from test_serving_cluster import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
CONFIGS = Path(__file__).parents[2] / "serve_configs"
BIN = Path(sys.executable).parent
ADAPTER = "runs/quickstart/train/adapter"  # where the files expect it
PROMPT, MOST = "Rewrite each Bible verse", 25


class Place:
    """A folder with a home of its own, and commands run in it; whatever of Ray they started ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.environment = {
            **os.environ, "HOME": str(folder), "RAY_TMPDIR": str(folder / "r"), "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local",
        }  # fmt: skip
        self.dashboard = free_port()
        self._started: list[subprocess.Popen[str]] = []

    def write(self, file: str, change: Any) -> str:
        """A file of serve_configs/, with what is different here."""
        told = yaml.safe_load((CONFIGS / file).read_text())
        change(told, told["applications"][0]["args"])
        (self.folder / file).write_text(yaml.safe_dump(told))
        return file

    def start(self, *command: str) -> subprocess.Popen[str]:
        out = (self.folder / f"{Path(command[0]).name}.{len(self._started)}.log").open("w")
        whole = [str(BIN / command[0]), *command[1:]]
        process = subprocess.Popen(
            whole, cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT, text=True
        )
        self._started.append(process)
        return process

    def ray_start(self) -> None:
        """`ray start --head`, beside any other cluster of this machine."""
        ports = {"port": free_port(), "dashboard-port": self.dashboard, "dashboard-agent-listen-port": free_port(),
                 "ray-client-server-port": free_port(), "min-worker-port": 0, "max-worker-port": 0}  # fmt: skip
        del self.environment["RAY_ADDRESS"]
        self.start(
            "ray", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=100000000",
            "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder / 'r'}",
            *(f"--{name}={value}" for name, value in ports.items()),
        )  # fmt: skip
        answers(f"http://127.0.0.1:{self.dashboard}/api/serve/applications/", self)

    def deploy(self, file: str) -> None:
        command = [str(BIN / "serve"), "deploy", "-a", f"http://127.0.0.1:{self.dashboard}", file]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def running(self) -> bool:
        return all(process.poll() is None for process in self._started)

    def processes(self) -> list[psutil.Process]:
        """Whatever belongs to this place: its folder stands in the command or the environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()) or process.environ().get("HOME") == str(self.folder):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def end(self) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(self.processes(), timeout=15)
        for process in self.processes():
            process.kill()
        for process in self._started:
            process.wait(10)


def answers(url: str, place: Place, **options: Any) -> None:
    until, said = time.monotonic() + 150, ""
    while time.monotonic() < until:
        assert place.running(), place.log()
        try:
            got = httpx.get(url, timeout=10, **options)
            if got.status_code == 200:
                return
            said = f"{got.status_code}: {got.text[:300]}"
        except httpx.TransportError as error:
            said = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer: {said}\n{place.log()}")


@pytest.fixture
def place() -> Iterator[Any]:
    base = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))  # Ray's socket paths must stay short
    made: list[Place] = []

    def make(name: str) -> Place:
        made.append(Place(base / name))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def expected(tiny_source, tmp_path) -> tuple[str, Path]:
    """What the offline decoder answers, and the folder of the adapter that it used."""
    source, folder = tiny_source("llama"), tmp_path / "adapter"
    save_adapter(source.describe().card, folder)
    (text,) = offline_texts(source, folder, [PROMPT], MOST, 0.9)
    return text, folder


def ask(url: str) -> str:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        assert next(iter(client.models.list())).id == "bible_modern"
        asked: dict[str, Any] = {"model": "bible_modern", "prompt": PROMPT, "max_tokens": MOST, "temperature": 0}
        whole = client.completions.create(**asked).choices[0].text
        assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == whole
        return whole


def exact(args: dict[str, Any], plm: str | None = None) -> None:
    """As exact as what it is compared with."""
    if plm is not None:
        args["plm"] = {"name": plm, "dtype": "float32", "device": "cpu"}
    if "decoder" in args:
        args["decoder"]["dtype"] = "float32"


def test_serve_run_serves_both_owners_until_it_is_interrupted(place, tiny_plm_folder, expected):
    want, adapter = expected
    here, port = place("local"), free_port()

    def change(told: dict[str, Any], args: dict[str, Any]) -> None:
        told["http_options"]["port"] = port
        exact(args, tiny_plm_folder("llama"))

    shutil.copytree(adapter, here.folder / ADAPTER)
    process = here.start("serve", "run", here.write("local.yaml", change))
    answers(f"http://127.0.0.1:{port}/v1/models", here)
    assert ask(f"http://127.0.0.1:{port}/v1") == want
    process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.wait(60) in (0, 130), here.log()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/v1/models")
    _, left = psutil.wait_procs(here.processes(), timeout=30)
    assert not left, left


def test_serve_deploy_joins_two_clusters_by_https_and_a_key(place, tiny_plm_folder, expected):
    want, adapter = expected
    theirs, ours = place("plm"), place("data")
    crt, private = certificate(theirs.folder, "server")
    port, ours_port = free_port(), free_port()

    def change_theirs(told: dict[str, Any], args: dict[str, Any]) -> None:
        told["http_options"] |= {"port": port, "ssl_certfile": crt, "ssl_keyfile": private}
        exact(args, tiny_plm_folder("llama"))

    def change_ours(told: dict[str, Any], args: dict[str, Any]) -> None:
        told["http_options"]["port"] = ours_port
        args["plm"] |= {"url": f"https://127.0.0.1:{port}", "ca_file": crt}
        exact(args)

    made = subprocess.run(
        [BIN / "pema-ray", "serve-key", "keys.yaml", "a data owner", "--rows-per-minute", "200000"],
        cwd=theirs.folder, env=theirs.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (ours.folder / "plm_key").write_text(made.stdout.strip())
    shutil.copytree(adapter, ours.folder / ADAPTER)
    theirs.ray_start()
    theirs.deploy(theirs.write("plm_owner.yaml", change_theirs))
    import ssl

    answers(f"https://127.0.0.1:{port}/healthz", theirs, verify=ssl.create_default_context(cafile=crt))
    ours.ray_start()
    ours.deploy(ours.write("data_owner.yaml", change_ours))
    answers(f"http://127.0.0.1:{ours_port}/v1/models", ours)
    assert ask(f"http://127.0.0.1:{ours_port}/v1") == want
    audit = (theirs.folder / "audit.jsonl").read_text()  # where the file says, from where `ray start` was said
    assert '"client": "a data owner", "what": "step", "status": 200' in audit

    def mistake(told: dict[str, Any], args: dict[str, Any]) -> None:
        change_ours(told, args)
        told["applications"][0]["deployments"][0]["user_config"]["adapters"]["more"] = "runs/nowhere"

    ours.deploy(ours.write("data_owner.yaml", mistake))
    told, until = {}, time.monotonic() + 60
    while "rejected" not in told and time.monotonic() < until:
        told = httpx.get(f"http://127.0.0.1:{ours_port}/healthz").json()
        time.sleep(0.5)
    assert told["ready"] and "runs/nowhere" in told["rejected"]
    time.sleep(10)  # in which Serve would have replaced a replica whose change had failed
    assert ask(f"http://127.0.0.1:{ours_port}/v1") == want
    ours.deploy(ours.write("data_owner.yaml", change_ours))
    until = time.monotonic() + 60
    while "rejected" in told and time.monotonic() < until:
        told = httpx.get(f"http://127.0.0.1:{ours_port}/healthz").json()
        time.sleep(0.5)
    assert told["ready"] and "rejected" not in told
