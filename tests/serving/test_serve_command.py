"""`serve run` and `serve deploy` with the files of serve_configs/, as the docs say, tested over HTTP."""

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
from https_kit import certificate
from test_serving_cluster import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
CONFIGS = Path(__file__).parents[2] / "serve_configs"
BIN = Path(sys.executable).parent
ADAPTER = "runs/quickstart/train/adapter"  # where the files expect it
PROMPT, MAX_TOKENS = "Rewrite each Bible verse", 25


class Place:
    """A folder with a home of its own, for commands; `end` stops all their processes."""

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
        """A file of serve_configs/, changed."""
        config = yaml.safe_load((CONFIGS / file).read_text())
        change(config, config["applications"][0]["args"])
        (self.folder / file).write_text(yaml.safe_dump(config))
        return file

    def start(self, *command: str) -> subprocess.Popen[str]:
        out = (self.folder / f"{Path(command[0]).name}.{len(self._started)}.log").open("w")
        arguments = [str(BIN / command[0]), *command[1:]]
        process = subprocess.Popen(
            arguments, cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT, text=True
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
        process = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr[-2000:]

    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def running(self) -> bool:
        return all(process.poll() is None for process in self._started)

    def processes(self) -> list[psutil.Process]:
        """All processes with this folder in their command or environment."""
        processes = []
        for process in psutil.process_iter():
            try:
                if str(self.folder) in " ".join(process.cmdline()) or process.environ().get("HOME") == str(self.folder):
                    processes.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return processes

    def end(self) -> None:
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs(self.processes(), timeout=15)
        for process in self.processes():
            process.kill()
        for process in self._started:
            process.wait(10)


def answers(url: str, place: Place, **options: Any) -> None:
    until, problem = time.monotonic() + 150, ""
    while time.monotonic() < until:
        assert place.running(), place.log()
        try:
            response = httpx.get(url, timeout=10, **options)
            if response.status_code == 200:
                return
            problem = f"{response.status_code}: {response.text[:300]}"
        except httpx.TransportError as error:
            problem = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer: {problem}\n{place.log()}")


@pytest.fixture
def place() -> Iterator[Any]:
    base = Path(tempfile.mkdtemp(prefix="ps", dir="/tmp"))  # Ray's socket paths must stay short
    places: list[Place] = []

    def make(name: str) -> Place:
        places.append(Place(base / name))
        return places[-1]

    try:
        yield make
    finally:
        for place_ in places:
            place_.end()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def expected(tiny_source, tmp_path) -> tuple[str, Path]:
    """What the offline decoder answers, and the folder of the adapter that it used."""
    source, folder = tiny_source("llama"), tmp_path / "adapter"
    save_adapter(source.describe().card, folder)
    (text,) = offline_texts(source, folder, [PROMPT], MAX_TOKENS, 0.9)
    return text, folder


def ask(url: str) -> str:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        assert next(iter(client.models.list())).id == "bible_modern"
        body: dict[str, Any] = {
            "model": "bible_modern",
            "prompt": PROMPT,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        text = client.completions.create(**body).choices[0].text
        assert "".join(piece.choices[0].text for piece in client.completions.create(**body, stream=True)) == text
        return text


def exact(args: dict[str, Any], plm: str | None = None) -> None:
    """As exact as what it is compared with."""
    if plm is not None:
        args["plm"] = {"name": plm, "dtype": "float32", "device": "cpu"}
    if "decoder" in args:
        args["decoder"]["dtype"] = "float32"


def test_serve_run_serves_both_owners_until_it_is_interrupted(place, tiny_plm_folder, expected):
    answer, adapter = expected
    place_, port = place("local"), free_port()

    def change(config: dict[str, Any], args: dict[str, Any]) -> None:
        config["http_options"]["port"] = port
        exact(args, tiny_plm_folder("llama"))

    shutil.copytree(adapter, place_.folder / ADAPTER)
    process = place_.start("serve", "run", place_.write("local.yaml", change))
    answers(f"http://127.0.0.1:{port}/v1/models", place_)
    assert ask(f"http://127.0.0.1:{port}/v1") == answer
    process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.wait(60) in (0, 130), place_.log()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/v1/models")
    _, left = psutil.wait_procs(place_.processes(), timeout=30)
    assert not left, left


def test_serve_deploy_joins_two_clusters_by_https_and_a_key(place, tiny_plm_folder, expected):
    answer, adapter = expected
    plm_owner, data_owner = place("plm"), place("data")
    crt, private = certificate(plm_owner.folder, "server")
    port, data_owner_port = free_port(), free_port()

    def change_plm_owner(config: dict[str, Any], args: dict[str, Any]) -> None:
        config["http_options"] |= {"port": port, "ssl_certfile": crt, "ssl_keyfile": private}
        exact(args, tiny_plm_folder("llama"))

    def change_data_owner(config: dict[str, Any], args: dict[str, Any]) -> None:
        config["http_options"]["port"] = data_owner_port
        args["plm"] |= {"url": f"https://127.0.0.1:{port}", "ca_file": crt}
        exact(args)

    key = subprocess.run(
        [BIN / "pema-ray", "serve-key", "keys.yaml", "a data owner", "--rows-per-minute", "200000"],
        cwd=plm_owner.folder, env=plm_owner.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (data_owner.folder / "plm_key").write_text(key.stdout.strip())
    shutil.copytree(adapter, data_owner.folder / ADAPTER)
    plm_owner.ray_start()
    plm_owner.deploy(plm_owner.write("plm_owner.yaml", change_plm_owner))
    import ssl

    answers(f"https://127.0.0.1:{port}/healthz", plm_owner, verify=ssl.create_default_context(cafile=crt))
    data_owner.ray_start()
    data_owner.deploy(data_owner.write("data_owner.yaml", change_data_owner))
    answers(f"http://127.0.0.1:{data_owner_port}/v1/models", data_owner)
    assert ask(f"http://127.0.0.1:{data_owner_port}/v1") == answer
    audit = (plm_owner.folder / "audit.jsonl").read_text()  # where the file says, from where `ray start` was said
    assert '"client": "a data owner", "what": "step", "status": 200' in audit

    def mistake(config: dict[str, Any], args: dict[str, Any]) -> None:
        change_data_owner(config, args)
        config["applications"][0]["deployments"][0]["user_config"]["adapters"]["more"] = "runs/nowhere"

    data_owner.deploy(data_owner.write("data_owner.yaml", mistake))
    health, until = {}, time.monotonic() + 60
    while "rejected" not in health and time.monotonic() < until:
        health = httpx.get(f"http://127.0.0.1:{data_owner_port}/healthz").json()
        time.sleep(0.5)
    assert health["ready"] and "runs/nowhere" in health["rejected"]
    time.sleep(10)  # in which Serve would have replaced a replica whose change had failed
    assert ask(f"http://127.0.0.1:{data_owner_port}/v1") == answer
    data_owner.deploy(data_owner.write("data_owner.yaml", change_data_owner))
    until = time.monotonic() + 60
    while "rejected" in health and time.monotonic() < until:
        health = httpx.get(f"http://127.0.0.1:{data_owner_port}/healthz").json()
        time.sleep(0.5)
    assert health["ready"] and "rejected" not in health
