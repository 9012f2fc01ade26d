"""From pairs to a prefix, and from a memory behind it to a report; what was made behind other prefixes is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pema_ray.data_owner.prefixed import TrainedPrefix
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.evaluation.comparison import Comparison
from pema_ray.evaluation.results import Evaluation
from pema_ray.line import LMHeadBundle
from pema_ray.memory import ExternalMemory
from pema_ray.pema.config import ExperimentConfig, load_config
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import Run
from pema_ray.pema.stages.systems import ComparedSystem
from pema_ray.pema.stages.train_prefix import _batches
from pema_ray.tasks import EncodedPair

PREFIX = {"rank": 4, "epochs": 4, "validate_every": 2, "learning_rate": 1e-2, "prefix_learning_rate": 5e-2}


def alone_head(config: ExperimentConfig) -> Path:
    return Path(config.run_dir) / "export_head" / "lm_head"


def test_a_prefix_is_trained_and_every_stage_runs_behind_it(experiment, ray_cluster, tmp_path: Path):
    path = experiment(
        task={"shots": 1, "limits": {"train": 20}},
        prefix={**PREFIX, "max_batch_tokens": 128},
        evaluate={"few_shot": 1, "generate_lambdas": [1.0]},
    )
    alone = load_config(path)
    for stage in ("prepare", "export_head", "train_prefix"):
        trained = PEMA.run(stage, alone)
    assert trained["dev_loss"] < trained["dev_loss_at_start"] and trained["best_step"] > 0
    assert PEMA.run("train_prefix", alone) == trained  # reused
    folder = Path(alone.run_dir) / "train_prefix" / "prefix"
    behind = load_config(path, [f"run_dir={tmp_path / 'behind'}", f"plm.prefix={folder}"])
    for stage in PEMA.chain:
        PEMA.run(stage, behind)
    run = Path(behind.run_dir)
    card = json.loads((run / "export_head" / "metrics.json").read_text())["card"]
    plain = json.loads((Path(alone.run_dir) / "export_head" / "metrics.json").read_text())["card"]
    assert card["fingerprint"].startswith(plain["fingerprint"] + "+")
    assert ExternalMemory.open(run / "build_memory" / "train").manifest.fingerprint == card["fingerprint"]
    own = TrainedPrefix.of_adapter(run / "train" / "adapter", LMHeadBundle.load(alone_head(alone)).card)
    assert own is not None and own.own_fingerprint == card["fingerprint"]  # for a service that has no plm.prefix
    evaluation = Evaluation.model_validate_json((run / "evaluate" / "evaluation.json").read_bytes())
    assert [system.name for system in evaluation.systems if system.kind == "plm"] == ["PLM, trained prefix"]
    assert Run(behind).finished("generate")
    (folder / "prefix.json").write_text(json.dumps({"replaces": [5], "fingerprint": plain["fingerprint"]}))
    assert not Run(behind).finished("export_head")  # the folder holds another prefix now
    PEMA.run("export_head", behind)
    with pytest.raises(UserError, match="holds a memory built from other examples or with other settings"):
        PEMA.run("build_memory", behind)
    third = load_config(path, [f"run_dir={tmp_path / 'third'}", f"plm.prefix={folder}"])
    (folder / "prefix.json").write_text(json.dumps({"replaces": [5], "fingerprint": "another"}))
    with pytest.raises(FingerprintMismatch):
        PEMA.run("export_head", third)


def test_what_stands_behind_a_prefix_is_compared(experiment, ray_cluster, tiny_plm_folder, tmp_path):
    compare = {"systems": ["plm", "pema", "prefix", "pema_prefix"], "few_shot": 1, "bootstrap_samples": 50}
    path = experiment(task={"limits": {"train": 20}}, prefix={**PREFIX, "max_batch_tokens": 128}, compare=compare)
    config = load_config(path)
    for stage in ("prepare", "export_head", "build_memory", "compare"):
        measured = PEMA.run(stage, config)
    run = Path(config.run_dir)
    comparison = Comparison.model_validate_json((run / "compare" / "comparison.json").read_bytes())
    peers = dict(zip(config.compare.systems, comparison.peers, strict=True))
    nll = {name: peer.mean("nll") for name, peer in peers.items()}
    assert nll["prefix"] < nll["plm"] and len(set(nll.values())) == 4
    assert peers["prefix"].mean("train_seconds") > 0 and peers["prefix"].given.endswith("gradients")
    assert (
        peers["pema_prefix"].mean("line_bytes") > peers["prefix"].mean("line_bytes") > peers["plm"].mean("line_bytes")
    )
    assert "steps of the prefix" in peers["prefix"].measurements[0].note
    (run / "compare" / "metrics.json").unlink()
    assert PEMA.run("compare", config)["nll"] == measured["nll"]
    other = load_config(path, ["prefix.epochs=2"])  # another prefix: the memories of the first are in nobody's way
    assert PEMA.run("compare", other)["nll"] != measured["nll"]
    none = load_config(path, ["plm.name=" + tiny_plm_folder("mamba"), f"run_dir={tmp_path / 'mamba'}"])
    with pytest.raises(UserError, match=r"takes no prefixes: leave out prefix and pema_prefix"):
        PEMA.run("compare", none)
    for name, again in (("prefix", True), ("pema_prefix", True), ("pema", False)):
        stamps = [ComparedSystem(Run(c), name, config.seed)._stamp() for c in (config, other)]
        assert (stamps[0] != stamps[1]) is again


def test_a_prompt_that_a_prefix_cannot_stand_before_is_named():
    pairs = [EncodedPair(1, [5, 6, 7], [8]), EncodedPair(2, [5, 9, 7], [8])]
    assert len(_batches(pairs[:1], (5, 6), 1, 64)) == 1
    for wrong in (pairs, [EncodedPair(2, [5, 6], [8])]):
        with pytest.raises(UserError, match=r"example 2 does not continue the 2 tokens"):
            _batches(wrong, (5, 6), 1, 64)


@pytest.mark.parametrize(
    ("settings", "shots", "positions"),
    [
        ({"positions": 7}, 1, 7),
        ({"text": "Translate into modern English."}, 0, None),
        ({"start": "random", "positions": 9}, 0, 9),
    ],
)
def test_prefixes_start_from_other_texts(experiment, settings, shots, positions):
    path = experiment(task={"shots": shots, "limits": {"train": 20}}, prefix={**PREFIX, **settings})
    config = load_config(path)
    for stage in ("prepare", "export_head", "train_prefix"):
        trained = PEMA.run(stage, config)
    assert trained["dev_loss"] < trained["dev_loss_at_start"]
    prefix = TrainedPrefix.from_pretrained(Path(config.run_dir) / "train_prefix" / "prefix")
    shared = Run(config).prompter().shared_tokens
    assert len(prefix.replaces) == shared and (positions is None or len(prefix.prefix) == positions)
    assert positions or len(prefix.prefix) > shared


def test_what_a_prefix_cannot_start_from_is_refused(experiment):
    without = load_config(experiment())
    for stage in ("prepare", "export_head"):
        PEMA.run(stage, without)
    with pytest.raises(UserError, match=r"starts from examples that all prompts show: set task.shots=3"):
        PEMA.run("train_prefix", without)
    for wrong, said in (
        ("task.show=similar", r"with task.show=similar every prompt shows others: set task.show=first"),
        ("prefix.positions=500", r"prefix.positions=500: the text that the prefix starts from has \d+ tokens"),
        ("prefix.frozen=400", r"prefix.frozen=400: the prefix has \d+ positions, so none is left to train"),
    ):
        config = load_config(experiment(task={"shots": 1}), [wrong])
        for stage in ("prepare", "export_head"):
            PEMA.run(stage, config)
        with pytest.raises(UserError, match=said):
            PEMA.run("train_prefix", config)
    with pytest.raises(UserError, match=r"of 2 positions 2 are frozen: none is left to train"):
        load_config(experiment(), ["prefix.positions=2", "prefix.frozen=2"])
    with pytest.raises(UserError, match=r"starts at random needs 'positions'"):
        load_config(experiment(), ["prefix.start=random"])
    with pytest.raises(UserError, match=r"leave 'workers' at its default"):
        load_config(experiment(), ["prefix.workers=2"])
    with pytest.raises(UserError, match=r"compare measures the PLM alone .* leave plm.prefix out"):
        PEMA.run("compare", load_config(experiment(), ["plm.prefix=anywhere"]))
    with pytest.raises(UserError, match=r"leave plm.prefix out"):
        PEMA.run("train_prefix", load_config(experiment(), ["plm.prefix=anywhere"]))
