"""A user's mistakes: exit code 2, one line that says what, where and what to do, no partial results."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pema_ray.errors import FingerprintMismatch
from pema_ray.line import LMHeadBundle
from pema_ray.memory import ExternalMemory, Manifest
from pema_ray.pema.config import load_config
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import Run


def refused(capsys, stage: str, path: Path, *overrides: str) -> str:
    """Run a stage that must be refused; returns its one line."""
    assert PEMA.run_stage(stage, path, overrides) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    complaints = [line for line in lines if line.startswith("error: ")]
    assert len(complaints) == 1, lines
    return complaints[0]


def written(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) if run.exists() else []


LINE = {"en": "the house", "du": "das Haus"}
GOOD = json.dumps(LINE) + "\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (GOOD.encode() + b'{"en": "a", \n', "line 2: broken JSON"),
        (GOOD.encode() + b'{"en": "a", "du": "\xff"}\n', "line 2: not valid UTF-8"),
        (GOOD.encode() * 2 + b'{"en": "a", "du": "  "}\n', "line 3: the target (column 'du') is empty"),
        (b'{"en": "a", "de": "b"}\n', "line 1: no column 'du'"),
    ],
)
def test_broken_files_are_named_with_their_line(capsys, tmp_path, experiment, content, complaint):
    path = experiment()
    (tmp_path / "train.jsonl").write_bytes(content)
    line = refused(capsys, "prepare", path)
    assert complaint in line
    assert "train.jsonl" in line
    assert written(tmp_path / "run") == []


def test_a_missing_file_is_named(capsys, tmp_path, experiment):
    path = experiment()
    assert "nowhere.jsonl: no such file." in refused(capsys, "prepare", path, "task.files.dev=nowhere.jsonl")
    assert "absent.yaml: no such file." in refused(capsys, "prepare", tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.rang=3", "unknown key 'train.rang'. Did you mean 'rank'?"),
        ("trian.rank=3", "unknown key 'trian'. Did you mean 'train'?"),
        ("train.kappa=1.5", "'train.kappa'"),
        ("seed=-1", "'seed'"),
        ("ray.num_cpus=2", "'ray.num_cpus'"),
        ("generate.lambda_max=-0.1", "'generate.lambda_max'"),
        ("evaluate.lambdas=[0.5, 2]", "'evaluate.lambdas'"),
        ("train.rank", "section.key=value"),
        ("task.name=bible_moderm", "Unknown task 'bible_moderm'. Did you mean 'bible_modern'?"),
        ("plm.name=./no/such/folder", "no such model folder"),
    ],
)
def test_settings_are_refused_by_name(capsys, tmp_path, experiment, override, complaint):
    stage = "export_head" if override.startswith("plm") else "prepare"
    assert complaint in refused(capsys, stage, experiment(), override)
    assert written(tmp_path / "run") == []


def test_a_stage_whose_parents_are_missing_says_which_to_run(capsys, experiment):
    path = experiment()
    assert "Run: pema-ray prepare" in refused(capsys, "build_memory", path)
    assert "Run: pema-ray build-memory" in refused(capsys, "train", path)


@pytest.mark.parametrize(
    "plm", [["plm.url=https://plm.example.org", "plm.key_file=key"], ["plm.serve=shared"]], ids=["url", "serve"]
)
def test_comparing_with_lora_is_refused_without_weights_before_anything_is_computed(
    capsys, tmp_path, experiment, monkeypatch, plm
):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray must not be started"))
    path, elsewhere = experiment(), ["plm.name=null", "plm.dtype=auto", *plm]
    run = Run(load_config(path, elsewhere))
    for stage in ("prepare", "export_head", "build_memory"):  # as if they were finished
        run.path(stage).mkdir(parents=True)
        run.path(stage, "metrics.json").write_text(json.dumps({"stamp": run.stamp(stage), "summary": ""}))
    before = written(tmp_path / "run")
    line = refused(capsys, "compare", path, *elsewhere, "compare.systems=[copy, lora]")
    assert "compare.systems: lora trains the PLM's weights" in line and plm[0] in line and "set plm.name" in line
    assert written(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["generate.split=dev"], "generate.split=dev: compare needs test"),
        (["plm.quantization={quant_method: bitsandbytes, load_in_8bit: true}"], "plm.quantization does not allow"),
        (["build_memory.deduplicate=true"], "memory_decoder needs a row for every token"),
    ],
)
def test_a_comparison_that_cannot_be_fair_is_refused_before_anything_is_computed(
    capsys, experiment, monkeypatch, overrides, reason
):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray must not be started"))
    line = refused(capsys, "compare", experiment(), *overrides, "compare.systems=[copy, memory_decoder, lora]")
    assert reason in line


def test_a_run_folder_that_cannot_be_one_is_refused(capsys, tmp_path, experiment):
    (tmp_path / "file").touch()
    line = refused(capsys, "prepare", experiment(), f"run_dir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file") in line and "Not a directory" in line


def test_a_full_disk_is_one_line_wherever_it_strikes(capsys, tmp_path, experiment, monkeypatch):
    import pema_ray.line.lm_head as lm_head

    path = experiment()
    assert PEMA.run_stage("prepare", path, []) == 0

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", "lm_head.safetensors")

    monkeypatch.setattr(lm_head, "save_file", full)
    assert "lm_head.safetensors: No space left on device" in refused(capsys, "export_head", path)
    assert not (tmp_path / "run" / "export_head" / "metrics.json").exists()
    assert not (tmp_path / "run" / "export_head" / "lm_head").exists()
    monkeypatch.undo()
    assert PEMA.run_stage("export_head", path, []) == 0


def test_torn_metrics_mean_that_a_stage_was_not_finished(capsys, tmp_path, experiment):
    path = experiment()
    assert PEMA.run_stage("prepare", path, []) == 0
    (tmp_path / "run" / "prepare" / "metrics.json").write_text("")
    assert "stage 'prepare' has not been run yet" in refused(capsys, "build_memory", path)
    assert PEMA.run_stage("prepare", path, []) == 0


def test_prepared_pairs_outlive_their_files(capsys, tmp_path, experiment):
    path = experiment()
    assert [PEMA.run_stage(name, path, []) for name in ("prepare", "export_head")] == [0, 0]
    train = tmp_path / "train.jsonl"
    content = train.read_text()
    train.unlink()
    assert PEMA.run_stage("prepare", path, []) == 0
    assert "Run: pema-ray build-memory" in refused(capsys, "train", path)
    train.write_text(content + content.splitlines()[0] + "\n")
    assert "stage 'prepare' was run with other settings" in refused(capsys, "build_memory", path)


@pytest.mark.cluster
def test_too_long_prompts_are_refused_before_anything_is_computed(capsys, tmp_path, experiment):
    path = experiment()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"en": "old house " * 80, "du": "alt"}) + "\n")
    assert [PEMA.run_stage(name, path, []) for name in ("prepare", "export_head")] == [0, 0]
    line = refused(capsys, "build_memory", path)
    assert "Split 'train', the example of line 25 of the file" in line and "prompt and target have" in line
    assert "allows 96" in line
    assert written(tmp_path / "run" / "build_memory") == []


@pytest.mark.cluster
def test_a_memory_is_never_used_with_another_plm_nor_when_damaged(
    capsys, tmp_path, experiment, ray_cluster, tiny_plm_folder
):
    path, run = experiment(), tmp_path / "run"
    assert [PEMA.run_stage(name, path, []) for name in ("prepare", "export_head", "build_memory")] == [0, 0, 0]
    assert "the rank must lie between 1 and the PLM's hidden size 32" in refused(capsys, "train", path, "train.rank=33")

    shard = run / "build_memory" / "train" / "shard-00001.parquet"
    contents = shard.read_bytes()
    shard.write_bytes(contents[:2000] + bytes([contents[2000] ^ 1]) + contents[2001:])
    assert f"{shard}: damaged shard" in refused(capsys, "train", path)
    assert not (run / "train" / "adapter").exists()
    shard.unlink()  # as the message advises
    assert PEMA.run_stage("build_memory", path, []) == 0
    assert shard.read_bytes() == contents

    overrides = [f"plm.name={tiny_plm_folder('llama', 1)}"]
    assert PEMA.run_stage("export_head", path, overrides) == 0
    line = refused(capsys, "build_memory", path, *overrides)
    manifest, card = (
        Manifest.read(run / "build_memory" / "train"),
        LMHeadBundle.load(run / "export_head" / "lm_head").card,
    )
    assert f"belongs to PLM '{manifest.plm_label}', but this run uses PLM '{card.label}'" in line
    assert manifest.fingerprint != card.fingerprint
    with pytest.raises(FingerprintMismatch):
        ExternalMemory.open(run / "build_memory" / "train", card)
    assert PEMA.run_stage("export_head", path, []) == 0
    line = refused(capsys, "build_memory", path, "build_memory.examples_per_shard=4")
    assert "holds a memory built from other examples or with other settings" in line


ENDS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills the process and its children at the end of the block."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.cluster
@ENDS
def test_ctrl_c_leaves_a_state_that_goes_on(tmp_path, experiment, number: int, code: int):
    path = experiment(build_memory={"examples_per_shard": 1})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    for name in ("prepare", "export_head"):
        assert PEMA.run_stage(name, path, []) == 0
    command = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "build_memory.py"), "--config", str(path)]
    pipe: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, **pipe)
    memory = tmp_path / "run" / "build_memory"
    with ended(process):
        deadline = time.monotonic() + 120
        while not list(memory.rglob("*.receipt.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == code
    assert "the same command goes on" in complaint
    assert not (memory / "metrics.json").exists()
    mtimes = {p: p.stat().st_mtime_ns for p in memory.rglob("shard-*.parquet")}
    rerun = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert rerun.returncode == 0, rerun.stderr[-2000:]
    assert all(p.stat().st_mtime_ns == at for p, at in mtimes.items())
    assert "build_memory" in PEMA.stages
    assert json.loads((memory / "metrics.json").read_text())["shards"] == 35


@pytest.mark.cluster
@ENDS
def test_ctrl_c_in_training_is_ours_and_training_goes_on(tmp_path, experiment, number: int, code: int):
    train = {"epochs": 100_000, "patience": 1_000_000, "validate_every": 4}
    path, run = experiment(train=train), tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    for name in ("prepare", "export_head", "build_memory"):
        assert PEMA.run_stage(name, path, []) == 0
    command = [sys.executable, str(Path(__file__).parents[2] / "jobs" / "train_adapter.py"), "--config", str(path)]
    reached = 0
    for _ in range(2):
        pipe: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **pipe)
        with ended(process):
            deadline = time.monotonic() + 180
            while _checkpointed(run) <= reached:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            process.send_signal(number)
            _, complaint = process.communicate(timeout=120)
        assert process.returncode == code, complaint[-2000:]
        assert "the same command goes on" in complaint
        first = json.loads((run / "train" / "progress.jsonl").read_text().splitlines()[0])
        assert (first["step"] == 0) == (reached == 0)  # validation before the first step, of the first run alone
        assert first["step"] >= reached
        reached = _checkpointed(run)
    assert not (run / "train" / "metrics.json").exists()


def _checkpointed(run: Path) -> int:
    """The step of the last checkpoint; 0 without one."""
    from safetensors import safe_open

    path = run / "train" / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])
