"""From parallel text to scored translations, through Ray, and what the stages refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.train import Result

from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.memory import ExternalMemory
from pema_ray.trime.translation import datastore, generate, train
from pema_ray.trime.translation.config import MtConfig
from pema_ray.trime.translation.data import Parallel

WORDS = ["the", "old", "house", "by", "a", "river", "has", "two", "doors", "and", "one", "green", "roof"]


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_the_stages_go_from_text_to_scores(tmp_path: Path):
    lines = [" ".join(WORDS[(i * 5 + j * (1 + i % 3)) % 13] for j in range(4 + i % 5)) for i in range(24)]
    text = tmp_path / "pairs.jsonl"
    text.write_text("".join(json.dumps({"source": line.upper(), "target": line}) + "\n" for line in lines))
    files = f"data.files={{train: [{text}], dev: [{text}], test: [{text}]}}"
    sizes = ["model.encoder_layers=1", "model.decoder_layers=1", "model.hidden_size=16", "model.ffn_size=16"]
    training = ["data.limits={dev: 4, test: 4}", "batches.max_tokens=120", "train.epochs=1", "train.cpus_per_worker=1"]
    decoding = ["generate.systems=[plain, knn, trime]", "generate.neighbours=4", "generate.length_extra=4"]
    overrides = [f"run_dir={tmp_path / 'run'}", files, *sizes, *training, *decoding]
    config = read_config(MtConfig, None, overrides)
    with pytest.raises(UserError, match="mt-train"):
        datastore.run(config)
    trained = train.run(config)
    assert trained["updates"] > 1
    reported = Result.from_path(str(tmp_path / "run/train/ray_train")).metrics or {}
    assert (reported["step"], reported["best_loss"]) == (trained["updates"], trained["dev_loss"])
    with pytest.raises(UserError, match="mt-datastore"):
        generate.run(config)
    datastore.run(config)
    pairs = Parallel.load(tmp_path / "run" / "prepare", "train")
    store = ExternalMemory.open(tmp_path / "run" / "datastore")
    assert store.view().target.tolist() == [token for target in pairs.target for token in [*target, 0]]
    metrics = generate.run(config)
    assert set(metrics["systems"]) == {"plain", "knn", "trime"} and "version:" in metrics["signature"]
    assert len((tmp_path / "run" / "generate" / "trime.txt").read_text().splitlines()) == 4
    with pytest.raises(UserError, match="generate.neighbours"):
        generate.run(read_config(MtConfig, None, [*overrides, "generate.neighbours=100000"]))
