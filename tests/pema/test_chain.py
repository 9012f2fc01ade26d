"""The whole path of an experiment: stage after stage, reused when nothing changed, done again when something did."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from pema_ray.data_owner.adapter.pema import PemaAdapter
from pema_ray.errors import UserError
from pema_ray.evaluation.comparison import Comparison, Measurement
from pema_ray.evaluation.results import Evaluation
from pema_ray.memory import ExternalMemory, published
from pema_ray.pema.config import SYSTEMS, load_config
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import Run
from pema_ray.pema.stages.systems import ComparedSystem

ROOT = Path(__file__).parents[2]
JOBS = ("prepare", "export_head", "build_memory", "train_adapter", "generate", "evaluate", "report")

LOOKING_BACK = {"build_memory": {"prompts": True}, "train": {"look_back": 1, "look_back_width": 8, "dropout": 0.0}}

pytestmark = pytest.mark.cluster


def test_an_experiment_runs_from_text_to_report_and_is_reused(experiment, ray_cluster, capsys):
    path = experiment(evaluate={"few_shot": 2})  # which these short texts do not allow
    config = load_config(path)
    measured = {name: PEMA.run(name, config) for name in PEMA.chain}

    run = Path(config.run_dir)
    assert measured["prepare"]["pairs"] == {"train": 24, "dev": 6, "test": 5}
    memory = ExternalMemory.open(run / "build_memory" / "train")
    assert len(memory) == measured["build_memory"]["rows"]["train"] == sum(len(shard) for shard in memory.shards())
    assert len(memory.manifest.shards) == 3
    adapter = PemaAdapter.from_pretrained(run / "train" / "adapter")
    assert adapter.A.shape == (16, 32)
    assert measured["train"]["steps"] == memory.manifest.rows // 64
    answers = [json.loads(line) for line in (run / "generate" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 5
    assert all(len(answer["tokens"]) <= 6 for answer in answers)
    evaluation = Evaluation.model_validate_json((run / "evaluate" / "evaluation.json").read_bytes())
    assert {system.kind for system in evaluation.systems} == {"copy", "plm", "pema"}
    assert evaluation.sweep.plm == evaluation.sweep.nll[0]
    assert (run / "report" / "report.html").stat().st_size > 10_000
    output = capsys.readouterr().out
    assert "copy of the source" in output
    assert "PLM, 2 examples shown" in " ".join(output.split())

    reused = {name: PEMA.run(name, config) for name in PEMA.chain}
    assert reused == measured

    adapter_file = run / "train" / "adapter" / "adapter_model.safetensors"
    with pytest.raises(UserError, match=r"50 workers ask for 50 CPU.* the Ray cluster has"):
        PEMA.run("train", load_config(path, ["train.kappa=0.5", "train.workers=50"]))
    assert adapter_file.exists()  # a refusal leaves what is there
    assert {name: PEMA.run(name, config) for name in PEMA.chain} == measured

    (run / "train" / "metrics.json").unlink()
    published.publish(run / "build_memory" / "train", "whole")
    try:
        metrics = PEMA.run("train", load_config(path, ["train.published=whole", "train.resume=false"]))
    finally:
        published.drop("whole")
    assert all(metrics[name] == measured["train"][name] for name in ("dev_prediction", "stamp"))

    changed = load_config(path, ["train.kappa=0.5"])
    PEMA.run("build_memory", changed)
    with pytest.raises(Exception, match="stage 'train' was run with other settings"):
        PEMA.run("generate", changed)
    assert PEMA.run("train", changed)["stamp"] != measured["train"]["stamp"]


@pytest.mark.slow  # what it rests on is tested in tests/data_owner/training/test_ray_training.py
def test_training_may_run_while_the_memory_is_built(experiment, ray_cluster):
    path = experiment(build_memory={"examples_per_shard": 2, "cpus_per_actor": 1}, train={"stream": True})
    config = load_config(path)
    for name in ("prepare", "export_head"):
        PEMA.run(name, config)
    trained = PEMA.run("train", config)
    run = Path(config.run_dir)
    built = json.loads((run / "build_memory" / "metrics.json").read_text())
    assert built["rows"]["train"] == len(ExternalMemory.open(run / "build_memory" / "train"))
    assert (built["train_shards"], set(built["rows"])) == (12, {"train", "dev", "test"})
    assert 1 <= built["shards_at_first_step"] <= 12
    assert trained["steps"] == built["rows"]["train"] // 64 and trained["rows"] == built["rows"]["train"]
    assert PEMA.run("build_memory", config) == built and PEMA.run("train", config) == trained
    PEMA.run("generate", config)
    with pytest.raises(UserError, match="train.stream needs build_memory.context=teacher_forced"):
        PEMA.run("train", load_config(path, ["build_memory.context=generated"]))


@pytest.mark.slow
def test_a_memory_of_the_generated_context_trains_too(experiment, ray_cluster):
    config = load_config(experiment(build_memory={"context": "generated", "sequences": 4}))
    measured = {name: PEMA.run(name, config) for name in PEMA.chain}
    run = Path(config.run_dir)
    contexts = {s: ExternalMemory.open(run / "build_memory" / s).manifest.context for s in ("train", "dev", "test")}
    assert contexts == {"train": "generated", "dev": "generated", "test": "teacher_forced"}
    assert measured["train"]["steps"] >= 1 and measured["evaluate"]["nll"]


@pytest.mark.slow  # a whole experiment trains on a published memory above
def test_a_published_memory_is_trained_on_where_it_lies(experiment, ray_cluster):
    path = experiment(**LOOKING_BACK)
    config = load_config(path)
    for name in ("prepare", "export_head", "build_memory"):
        PEMA.run(name, config)
    run = Path(config.run_dir)
    expected = PEMA.run("train", config)
    (run / "train" / "metrics.json").unlink()
    published.publish(run / "build_memory" / "train", "chain")
    try:
        metrics = PEMA.run("train", load_config(path, ["train.published=chain", "train.resume=false"]))
        assert metrics["dev_prediction"] == expected["dev_prediction"] and metrics["stamp"] == expected["stamp"]
        (run / "train" / "metrics.json").unlink()
        with pytest.raises(UserError, match="ray://other: no memory of that name is published on this cluster"):
            PEMA.run("train", load_config(path, ["train.published=other"]))
        published.drop("chain")
        published.publish(run / "build_memory" / "dev", "chain")
        with pytest.raises(UserError, match="train.published=chain: published from"):
            PEMA.run("train", load_config(path, ["train.published=chain"]))
    finally:
        published.drop("chain")


@pytest.mark.slow
def test_pema_is_compared_with_its_peers(experiment, ray_cluster, capsys):
    pytest.importorskip("faiss")
    pytest.importorskip("peft")
    compare = {
        "systems": [name for name in SYSTEMS if name != "pema_predicted_lambda"],  # which wants more dev rows
        "few_shot": 1,
        "knn": {"neighbours": 8, "temperatures": [10.0, 100.0], "lambdas": [0.2, 0.6]},
        "lora": {"rank": 2, "max_batch_tokens": 200, "learning_rates": [1e-3, 1e-2]},
        "small_lm": {"layers": 1, "neighbours": 8, "learning_rates": [1e-2], "epochs": 3, "alphas": [0.5, 1.0]},
        "seeds": 2,
        "single_seed": [name for name in SYSTEMS if name not in ("plm", "pema", "pema_shots")],
        "bootstrap_samples": 50,
    }
    path = experiment(compare=compare, build_memory={"prompts": True}, train={"reconstruction_epochs": 2})
    config = load_config(path)
    for name in ("prepare", "export_head", "build_memory", "train"):
        PEMA.run(name, config)
    measured = PEMA.run("compare", config)
    run = Path(config.run_dir)
    comparison = Comparison.model_validate_json((run / "compare" / "comparison.json").read_bytes())
    peers = dict(zip(config.compare.systems, comparison.peers, strict=True))
    assert list(peers) == list(config.compare.systems) and comparison.test_pairs == 5
    figures = set(Measurement.model_fields) - {"seed", "note"}
    means = {figure: {name: peer.mean(figure) for name, peer in peers.items()} for figure in figures}
    assert {name for name, value in means["nll"].items() if value is None} == {"copy"}
    untrained = {"copy", "plm", "few_shot", "few_shot_similar", "knn"}
    assert {name for name, value in means["train_seconds"].items() if value} == set(peers) - untrained
    likelihoods = [round(value, 6) for value in means["nll"].values() if value]
    assert len(set(likelihoods)) == len(likelihoods)  # all of them differ
    assert all(value > 0 for name, value in means["seconds_per_token"].items() if name != "copy")
    assert all(means["peak_bytes"][name] > 2**20 for name in set(peers) - untrained)
    assert not any(means["line_bytes"][name] for name in ("copy", "lora", "lora_shots"))
    assert means["line_bytes"]["pema"] > means["line_bytes"]["plm"] > 0
    assert {name for name, peer in peers.items() if len(peer.measurements) == 2} == {"pema", "pema_shots"}
    first, second = peers["pema"].measurements
    assert first.seed == config.seed and second.seed == config.seed + 1 and first.nll != second.nll
    assert peers["pema"].significance.bleu_p is None and comparison.reference == peers["pema"].name
    assert all(0 < p.significance.bleu_p <= 1 for name, p in peers.items() if name != "pema")
    assert all(p.significance.bleu_low <= p.significance.bleu_high for p in comparison.peers)
    table = (run / "compare" / "table.md").read_text()
    assert all(f"| {peer.name} |" in table for peer in comparison.peers) and "chosen on the dev memory" in table
    assert len({peer.name for peer in comparison.peers}) == len(comparison.peers)
    assert PEMA.run("compare", config) == measured
    (run / "compare" / "metrics.json").unlink()
    (run / "compare" / "knn" / "seed-0" / "measurement.json").unlink()
    capsys.readouterr()
    reused = PEMA.run("compare", config)
    measurements = sum(len(peer.measurements) for peer in comparison.peers)
    assert reused["bleu"] == measured["bleu"] and capsys.readouterr().out.count("measured before") == measurements - 1
    for name, override in (
        ("pema", "compare.dev_rows=9"),
        ("pema_shots", "compare.lambdas=[0.5]"),
        ("knn", "compare.dev_rows=9"),
        ("memory_decoder", "compare.knn.lambdas=[0.5]"),
        ("lora", "compare.lora.rank=3"),
    ):
        changed = ComparedSystem(Run(load_config(path, [override])), name, config.seed)
        assert changed._stamp() != ComparedSystem(Run(config), name, config.seed)._stamp()  # measured again, not reused
    with pytest.raises(UserError, match=r"'lorra' is no system. Did you mean 'lora'\?"):
        load_config(path, ["compare.systems=[plm, lorra]"])


@pytest.mark.slow
def test_two_training_workers_reach_what_one_reaches(experiment, ray_cluster):
    metrics = {}
    path = experiment(train={"dropout": 0.0})
    for workers in (1, 2):
        config = load_config(path, [f"train.workers={workers}"])
        for name in ("prepare", "export_head", "build_memory", "train"):
            metrics[workers] = PEMA.run(name, config)
    assert metrics[2]["dev_prediction"] == pytest.approx(metrics[1]["dev_prediction"], abs=1e-4)


def free_ports(count: int) -> list[int]:
    """Ports that no other cluster on this machine listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for socket_ in sockets:
            socket_.bind(("127.0.0.1", 0))
        return [socket_.getsockname()[1] for socket_ in sockets]


@pytest.fixture
def local_cluster():
    """A Ray cluster with the jobs API, in a home of its own; yields (dashboard address, environment)."""
    folder = Path(tempfile.mkdtemp(prefix="prj", dir="/tmp"))
    port, dashboard, agent, agent_grpc = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    start = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=4",
        f"--dashboard-port={dashboard}", "--object-store-memory=100000000", f"--temp-dir={folder / 'ray'}",
        "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
    ]  # fmt: skip
    process = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("the jobs API did not come up")
        yield address, environment
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submitted(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit a job; the agent that runs jobs starts some seconds after the API that accepts them."""
    deadline = time.monotonic() + 120
    while True:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        if "No available agent" not in process.stderr or time.monotonic() > deadline:
            return process


@pytest.mark.parametrize("stages", [3, pytest.param(len(JOBS), marks=pytest.mark.slow)])
def test_the_chain_runs_under_ray_job_submit(stages, experiment, local_cluster, tmp_path):
    address, environment = local_cluster
    path = experiment(**LOOKING_BACK, generate={"knn": {"weight": 0.1, "neighbours": 8}})
    working = tmp_path / "working"  # what a user submits: scripts, no data
    shutil.copytree(ROOT / "jobs", working / "jobs")
    for job in JOBS[:stages]:
        submit = [
            sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address,
            "--working-dir", str(working), "--",
            sys.executable, f"jobs/{job}.py", "--config", str(path), "seed=0",
        ]  # fmt: skip
        process = submitted(submit, environment)
        assert process.returncode == 0, f"{job}: {process.stdout[-3000:]}{process.stderr[-2000:]}"
    assert (tmp_path / "run" / "build_memory" / "train" / "manifest.json").exists()
    assert (tmp_path / "run" / "report" / "report.html").exists() == (stages == len(JOBS))

    bad = [*submit[:-4], f"jobs/{JOBS[0]}.py", "--config", str(path), "train.rang=3"]
    failed = submitted(bad, environment)
    assert failed.returncode != 0
    assert "unknown key 'train.rang'. Did you mean 'rank'?" in failed.stdout + failed.stderr
