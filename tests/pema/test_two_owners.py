"""A data owner without weights and without the PLM owner's code runs everything against another owner's service."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pema_ray.evaluation.results import Evaluation
from pema_ray.memory import ExternalMemory
from pema_ray.pema.demonstration import two_owners
from pema_ray.pema.demonstration.organisation import Organisation


def test_a_data_owners_process_cannot_import_the_plm_owners_code(tmp_path: Path):
    site = two_owners._site_without_plm_owner(tmp_path)
    owner = Organisation("data_owner", tmp_path / "data_owner", "127.0.0.1", site=site)

    def python(code: str) -> subprocess.CompletedProcess[str]:
        command = owner.command("-c", code)
        return subprocess.run(command, env=owner.environment(), cwd=tmp_path, capture_output=True, text=True)

    imports = "import pema_ray.commands.main, pema_ray.pema.serving.data_owner"
    program = f"{imports}; from pema_ray.pema.method import PEMA; print(*PEMA.chain)"
    process = python(program)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split()[0] == "prepare"
    assert "No module named 'pema_ray.plm_owner'" in python("import pema_ray.plm_owner").stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_the_whole_chain_runs_over_tls_and_a_key_and_leaves_no_weights(
    experiment: Callable[..., Path], tiny_plm, tmp_path: Path
):
    config = experiment(ray={"num_cpus": 4, "object_store_mb": 80})
    crossed = two_owners.run(config, tmp_path / "owners")

    run = tmp_path / "owners" / "data_owner" / "run"
    evaluation = Evaluation.model_validate_json((run / "evaluate" / "evaluation.json").read_bytes())
    assert {system.kind for system in evaluation.systems} == {"copy", "plm", "pema"}
    assert (run / "report" / "report.html").stat().st_size > 10_000
    memory = ExternalMemory.open(run / "build_memory" / "train")
    assert memory.manifest.fingerprint == evaluation.fingerprint
    assert set(crossed["audit"]) >= {"model", "lm-head", "extract", "step", "close"}
    built = sum(len(ExternalMemory.open(run / "build_memory" / split)) for split in ("train", "dev", "test"))
    assert crossed["audit"]["extract"]["rows"] == built
    bytes_a_row = memory.manifest.hidden_size * 4
    assert built * bytes_a_row < crossed["audit"]["extract"]["sent_bytes"] < 1.2 * built * bytes_a_row  # tiny frames
    assert isinstance(crossed["answer"]["text"], str)
    log = (tmp_path / "owners" / "plm_owner" / "audit.jsonl").read_text()
    assert all(set(json.loads(line)) <= LOGGED for line in log.splitlines())

    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shared = {"lm_head.weight", "model.norm.weight"}
    parameters = dict(tiny_plm("llama").model.named_parameters())
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)[:64]
        kinds = (flat.float(), flat.to(torch.bfloat16).view(torch.int16), flat.to(torch.float16).view(torch.int16))
        needles = [kind.numpy().tobytes() for kind in kinds]
        holders = {path.name for path, content in contents.items() if any(needle in content for needle in needles)}
        assert holders == ({"lm_head.safetensors"} if name in shared else set()), name


LOGGED = {
    "time", "id", "client", "what", "status", "seconds", "rows", "tokens", "sessions", "received_bytes", "sent_bytes",
}  # fmt: skip


def test_a_service_that_does_not_start_is_named_with_its_last_words(tmp_path: Path):
    owner = Organisation("plm_owner", tmp_path, "127.0.0.1")
    with (
        pytest.raises(Exception, match=r"plm_owner: its service did not start: error: no.yaml: no such file"),
        owner.service(lambda: False, "serve", "--topology", "no.yaml"),
    ):
        pass
