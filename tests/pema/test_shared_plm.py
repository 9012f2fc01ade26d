"""Stages of one cluster share a running PLM owner (`plm.serve`): the same memory and answers as with `plm.name`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from pema_ray.errors import UserError
from pema_ray.evaluation.results import Evaluation
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory import ExternalMemory
from pema_ray.pema.config import ExperimentConfig, load_config
from pema_ray.pema.method import PEMA
from pema_ray.plm_owner import EngineConfig
from pema_ray.plm_owner.service.application import plm_engine
from pema_ray.runtime.serving.scale import Scale

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
CHAIN = ("prepare", "export_head", "build_memory", "train", "generate", "evaluate")


@pytest.fixture
def shared(ray_cluster, tiny_plm_folder) -> Iterator[None]:
    """The PLM owner's replica as application `shared`, without any port to the outside."""
    plm = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu")
    serve.start(proxy_location="Disabled")
    serve.run(plm_engine(plm, EngineConfig(slots=8), Scale(cpus=0.1)), name="shared", route_prefix=None)
    yield
    serve.shutdown()


def test_a_shared_plm_owner_gives_the_memory_and_answers_of_a_plm_of_ones_own(
    experiment, shared, tmp_path, tiny_plm_folder
):
    path = experiment(generate={"decoding": "sample", "schedule": "linear"})
    runs = {
        "own": load_config(path, [f"run_dir={tmp_path / 'own'}"]),
        "shared": load_config(
            path, [f"run_dir={tmp_path / 'shared'}", "plm.name=null", "plm.dtype=auto", "plm.serve=shared"]
        ),
    }
    measured = {name: {stage: PEMA.run(stage, config) for stage in CHAIN} for name, config in runs.items()}

    shards = {name: _shards(config) for name, config in runs.items()}
    assert shards["own"] == shards["shared"] and len(shards["own"]) == 5
    rows = {name: _answers(config) for name, config in runs.items()}
    assert rows["own"] == rows["shared"] and len(rows["own"]) == 5
    assert measured["own"]["train"]["dev_prediction"] == measured["shared"]["train"]["dev_prediction"]
    evaluations = [_evaluation(config) for config in runs.values()]
    assert evaluations[0].sweep == evaluations[1].sweep
    assert evaluations[0].fingerprint == evaluations[1].fingerprint

    config = runs["shared"]
    (tmp_path / "shared" / "generate" / "metrics.json").unlink()
    other = PLMConfig(name=tiny_plm_folder("llama", 1), dtype="float32", device="cpu")
    serve.run(plm_engine(other, EngineConfig(slots=8), Scale(cpus=0.1)), name="shared", route_prefix=None)
    with pytest.raises(UserError, match=r"plm.serve=shared belongs to PLM .*, but this run uses PLM"):
        PEMA.run("generate", config)
    serve.delete("shared")
    with pytest.raises(UserError, match=r"plm.serve=shared: no PLM owner of this name runs .* only: none. Start one"):
        PEMA.run("generate", config)


def _shards(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Split and sha256 of every shard of a run's memories."""
    folders = ((split, Path(config.run_dir) / "build_memory" / split) for split in ("train", "dev", "test"))
    return [(split, shard.sha256) for split, at in folders for shard in ExternalMemory.open(at).manifest.shards]


def _answers(config: ExperimentConfig) -> list[dict]:
    """The rows of `answers.jsonl`, without what time they took."""
    lines = (Path(config.run_dir) / "generate" / "answers.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def _evaluation(config: ExperimentConfig) -> Evaluation:
    return Evaluation.model_validate_json((Path(config.run_dir) / "evaluate" / "evaluation.json").read_bytes())
