"""A whole experiment on a tiny random PLM and a few pairs of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

WORDS = ("the", "house", "is", "old", "and", "garden", "large", "people", "ye", "have", "seen", "tell", "them", "verse")


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Pairs whose target is the reversed source: enough to run all stages, nothing to learn."""
    import random

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 6))
        rows.append({"en": " ".join(words), "du": " ".join(reversed(words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def experiment(tmp_path: Path, tiny_plm_folder) -> Callable[..., Path]:
    """Writes the YAML of an experiment that takes seconds; keyword arguments replace whole sections' keys."""

    def make(**sections: dict) -> Path:
        data = {
            "run_dir": str(tmp_path / "run"),
            "plm": {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu"},
            "task": {
                "name": "wmt22_en_de",
                "files": {
                    split: str(write_pairs(tmp_path / f"{split}.jsonl", count, seed))
                    for seed, (split, count) in enumerate({"train": 24, "dev": 6, "test": 5}.items())
                },
            },
            "build_memory": {"examples_per_shard": 8, "cpus_per_actor": 1},
            "train": {"rank": 16, "batch_size": 64, "validate_every": 2, "epochs": 1, "cpus_per_worker": 1},
            "generate": {"max_new_tokens": 6, "batch_size": 4, "cpus_per_actor": 1},
            "evaluate": {"generate_lambdas": [1.0], "few_shot": 0, "sample_pairs": 3},
        }
        for name, keys in sections.items():
            data[name] = {**data.get(name, {}), **keys} if isinstance(keys, dict) else keys
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return make
