"""The stages on a local Ray: BM25's walk, training by workers, one of which is killed; jobs and commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ray.train import Result
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.errors import UserError
from pema_ray.training.checkpoint import load_checkpoint
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.model.registry import load_model, make_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages import batches as walk
from pema_ray.trime.stages import prepare, train
from pema_ray.trime.text.segments import Segments, TokenStream
from pema_ray.trime.training.trainer import TrimeTrainer

SHAPE = {"layers": 2, "hidden_size": 16, "ffn_size": 32, "heads": 2, "cutoffs": [8], "factor": 2, "dropout": 0.1}


def configured(folder: Path, batches: dict | None = None, **settings) -> TrimeConfig:
    return TrimeConfig.model_validate(
        {
            "run_dir": str(folder),
            "prepare": {"files": {split: [str(folder / f"{split}.txt")] for split in ("train", "dev", "test")}},
            "model": {"shape": SHAPE},
            "batches": {"segment": 16, "group": 4, **(batches or {})},
            "train": {"updates": 8, "validate_every": 2, "cpus_per_worker": 1, "trackers": [], **settings},
        }
    )


@pytest.fixture(scope="module")
def corpus(ray_cluster, tmp_path_factory) -> Path:
    """600 training tokens of 30 words, in articles; prepared."""
    folder, draw = tmp_path_factory.mktemp("trime"), np.random.default_rng(0)
    for split, lines in {"train": 60, "dev": 12, "test": 12}.items():
        words = [" ".join(f"w{n}" for n in draw.integers(0, 28, 9)) for _ in range(lines)]
        text = "".join(f" = Title {n} = \n{line}\n" if n % 6 == 0 else line + "\n" for n, line in enumerate(words))
        (folder / f"{split}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:  # as Ray Data would, in this process
        patch.setattr(prepare, "_map", lambda work, shards, tick: [work(shard) for shard in shards])
        prepare.run(configured(folder))
    return folder


@pytest.mark.cluster
def test_training_with_bm25_batches_needs_its_walk_and_then_runs_with_two_workers(corpus: Path):
    config = configured(corpus, {"order": "bm25"}, memory="ext", workers=2, ce_epochs=0.2)
    with pytest.raises(UserError, match="stage 'batches' has not been run yet. Run: pema-ray trime batches"):
        train.run(config)
    walked = walk.run(config)
    segments = Segments(TokenStream.open(corpus / "prepare", "train"), 16)
    assert sorted(walk.read_walk(corpus / "batches", len(segments))) == list(range(walked["segments"]))
    metrics = train.run(config)
    first = json.loads((corpus / "train/history.json").read_text())["validation"][0]
    assert metrics["dev_loss"] < first["loss"] and metrics["tokens"] == pytest.approx(8 * 64, abs=64)
    model = load_model(corpus / "train/model")
    best, _ = load_checkpoint(corpus / "train/best.safetensors")
    assert all(torch.equal(tensor, best["model"][name]) for name, tensor in model.state_dict().items())
    reported = Result.from_path(str(corpus / "train/ray_train")).metrics or {}
    assert reported["best_loss"] == metrics["dev_loss"] and reported["step"] == metrics["updates"]
    assert train.run(config) == metrics  # reused


@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_the_model_is_that_of_an_undisturbed_run(corpus: Path, tmp_path: Path):
    """One worker, float32: bit for bit, and those of a run in this process."""
    shutil.copytree(corpus / "prepare", tmp_path / "prepare")
    config = configured(corpus, updates=400, validate_every=10).model_copy(update={"run_dir": str(tmp_path)})
    text, dev = (Segments(TokenStream.open(corpus / "prepare", split), 16) for split in ("train", "dev"))
    torch.manual_seed(config.seed)
    model = make_model(config.model, TrimeRun(config).metrics("prepare")["vocabulary"], 16)
    TrimeTrainer(config, model, text, dev, tmp_path / "undisturbed").run()
    expected = load_checkpoint(tmp_path / "undisturbed/checkpoint.safetensors")[0]
    checkpoint, killed = tmp_path / "train/checkpoint.safetensors", []

    def kill_once() -> None:
        while not killed:
            if checkpoint.exists():
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(load_checkpoint(checkpoint)[1]["step"])
                        return
            threading.Event().wait(0.005)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    train.run(config)
    killer.join(1)
    assert killed and killed[0] < 400
    tensors_of, state = load_checkpoint(checkpoint)
    assert state["step"] == 400
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, tensors_of[group][name]), name


@pytest.mark.cluster
def test_a_group_larger_than_the_corpus_is_refused(corpus: Path):
    with pytest.raises(UserError, match=r"batches.group \(500\) is more than the training split's \d+ segments"):
        train.run(configured(corpus, {"group": 500}))


@pytest.mark.cluster
def test_a_walk_through_too_few_segments_is_refused(corpus: Path):
    config = configured(corpus, {"order": "bm25", "segment": 400})
    with pytest.raises(UserError, match="2 training segments of 400 tokens are too few to search"):
        walk.run(config)
    with pytest.raises(UserError, match="batches.order=random needs no search"):
        walk.run(configured(corpus))


# ── without Ray ─────────────────────────────────────────────────────────────


def test_stages_refuse_what_is_not_there_and_other_settings(tmp_path: Path):
    config = configured(tmp_path)
    with pytest.raises(UserError, match="stage 'prepare' has not been run yet. Run: pema-ray trime prepare"):
        train.run(config)
    run = TrimeRun(config)
    run.path("prepare").mkdir()
    run.path("prepare", "metrics.json").write_text('{"stamp": "0", "summary": ""}')
    with pytest.raises(
        UserError, match="was run with other settings than this run's. Run it again: pema-ray trime prepare"
    ):
        train.run(config)


def test_speed_settings_change_no_stamp_and_others_do():
    config = configured(Path("x"))
    same = configured(Path("x"), cpus_per_worker=2, trackers=["mlflow"], max_failures=1)
    changed = configured(Path("x"), learning_rate=0.1)
    stamps = [TrimeRun(c).stamp("train") for c in (config, same, changed)]
    assert stamps[0] == stamps[1] != stamps[2]
    assert TrimeRun(changed).stamp("prepare") == TrimeRun(config).stamp("prepare")


def test_commands_list_their_settings_and_say_mistakes_in_one_line():
    runner = CliRunner()
    result = runner.invoke(app, ["trime", "train", "--help"])
    assert result.exit_code == 0 and "train.hide_local=0.9" in result.output and "model.shape.cutoffs" in result.output
    dry = ["trime", "train", "--dry-run", "-c", "configs/trime/wikitext103_247m_ext.yaml"]
    result = runner.invoke(app, dry)
    assert result.exit_code == 0 and "246,932,928" in result.output and "286,000 of 73,728 tokens" in result.output
    result = runner.invoke(app, [*dry, "train.memroy=long"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parents[3] / "jobs").glob("trime_*.py")), ids=lambda p: p.stem
)
def test_every_stage_has_a_job(script: Path):
    output = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--config" in output and "section.key=value" in output
