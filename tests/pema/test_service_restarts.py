"""The PLM owner's service is killed and restarted repeatedly during a build and during a generation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory
from pema_ray.pema.config import load_config
from pema_ray.pema.demonstration.organisation import self_signed_certificate
from pema_ray.pema.method import PEMA
from pema_ray.plm_owner.service.access import Quota, add_client

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
KILLS = 5


class Service:
    """The process, its files, and a thread that kills it as often as work gets on."""

    def __init__(self, folder: Path, plm: str) -> None:
        self.folder, self._plm = folder, plm
        folder.mkdir()
        self_signed_certificate(folder, "127.0.0.1")
        (folder / "key").write_text(add_client(folder / "keys.yaml", "data owner", Quota()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.kills = 0
        self._over = threading.Event()
        self.start()

    def start(self) -> None:
        script = Path(__file__).with_name("plm_service.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(self.folder), str(self.port), self._plm],
            env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        )

    def wait(self) -> None:
        """Until the service listens."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise AssertionError("the service does not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def answered(self) -> int:
        """Extractions and steps that were answered so far."""
        try:
            lines = (self.folder / "audit.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return sum(entry["what"] in ("extract", "step") and entry["status"] == 200 for entry in entries)

    def kill_under(self, work: Callable[[], object], every: int) -> None:
        """Do the work; kill the service after every `every` answers, `KILLS` times in all."""

        def killing() -> None:
            next_at = self.answered + every
            while self.kills < KILLS and not self._over.wait(0.02):
                if self.answered >= next_at:
                    self.kill()
                    self.kills += 1
                    next_at = self.answered + every
                    self.start()

        self.kills = 0
        self._over.clear()
        thread = threading.Thread(target=killing)
        thread.start()
        try:
            work()
        finally:
            self._over.set()
            thread.join()


@pytest.fixture
def service(tmp_path: Path, tiny_plm_folder) -> Iterator[Service]:
    plm_service = Service(tmp_path / "plm_owner", tiny_plm_folder("llama"))
    try:
        yield plm_service
    finally:
        plm_service.kill()


def test_a_memory_and_answers_are_those_of_an_undisturbed_plm(experiment, ray_cluster, service, tmp_path):
    sizes = {"build_memory": {"examples_per_shard": 1, "cpus_per_actor": 1, "requests_in_flight": 2}}
    path = experiment(**sizes, generate={"max_new_tokens": 20, "batch_size": 2, "cpus_per_actor": 1})
    own = load_config(path, [f"run_dir={tmp_path / 'own'}"])
    for name in ("prepare", "export_head", "build_memory", "train", "generate"):
        PEMA.run(name, own)

    url = f"https://127.0.0.1:{service.port}"
    keys = [f"plm.key_file={service.folder / 'key'}", f"plm.ca_file={service.folder / 'server.crt'}"]
    plm = ["plm.name=null", "plm.dtype=auto", "plm.device=cpu", f"plm.url={url}", "plm.timeout_seconds=10", *keys]
    remote = load_config(path, [f"run_dir={tmp_path / 'theirs'}", *plm])
    PEMA.run("prepare", remote)
    with pytest.raises(UserError, match="cannot be reached"):
        PEMA.run(
            "export_head", load_config(path, [f"run_dir={tmp_path / 'theirs'}", *plm, "plm.url=https://127.0.0.1:1"])
        )
    service.wait()
    PEMA.run("export_head", remote)
    service.kill_under(lambda: PEMA.run("build_memory", remote), every=3)
    assert service.kills == KILLS
    for split in ("train", "dev", "test"):
        expected, memory = (ExternalMemory.open(tmp_path / run / "build_memory" / split) for run in ("own", "theirs"))
        assert [s.sha256 for s in expected.manifest.shards] == [s.sha256 for s in memory.manifest.shards]
    PEMA.run("train", remote)
    service.kill_under(lambda: PEMA.run("generate", remote), every=4)
    assert service.kills == KILLS
    answers = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
        for text in ((tmp_path / run / "generate" / "answers.jsonl").read_text() for run in ("own", "theirs"))
    ]
    assert [[t["token"] for t in row["tokens"]] for row in answers[0]] == [
        [t["token"] for t in row["tokens"]] for row in answers[1]
    ]
    assert [row["answer"] for row in answers[0]] == [row["answer"] for row in answers[1]]
