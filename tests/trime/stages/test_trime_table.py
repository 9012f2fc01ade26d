"""One command from a corpus to the table, and again where it stopped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pema_ray.experiment.configuration import read_config
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.stages import table
from pema_ray.trime.stages.table import Table


def corpus(folder: Path) -> str:
    """Articles of few words, one file."""
    rng, lines = random.Random(0), []
    for number in range(24):
        topic = [f"w{rng.randrange(40)}" for _ in range(8)]
        lines.append(f" = Article {number} = ")
        lines += [" ".join(rng.choice(topic) for _ in range(20)) for _ in range(6)]
    path = folder / "corpus.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.slow
@pytest.mark.cluster
def test_one_command_makes_the_table_and_goes_on_where_it_stopped(ray_cluster, tmp_path: Path, capsys, monkeypatch):
    config = read_config(
        TrimeConfig,
        None,
        [
            f"run_dir={tmp_path / 'table'}", f"prepare.files={{all: [{corpus(tmp_path)}]}}",
            "prepare.shares={dev: 0.2, test: 0.2}", "model.shape={layers: 1, hidden_size: 16, ffn_size: 32, heads: 2}",
            "batches={segment: 16, group: 4}", "train.updates=6", "train.validate_every=3", "train.cpus_per_worker=1",
            "train.trackers=[]", "evaluate.mem_size=64", "evaluate.neighbours=8", "table.seeds=[0]",
            "table.memories=[none, local, ext]",
        ],
    )  # fmt: skip

    class Stopped(Exception):
        pass

    def stop(run_config):
        if "ext" in run_config.run_dir:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(table.walk, "run", stop)
        with pytest.raises(Stopped):
            table.run(config)
    result = Table.model_validate_json((tmp_path / "table" / "table.json").read_text())
    assert {row.memory for row in result.rows} == {"none", "local"}  # what was finished can be read
    capsys.readouterr()
    table.run(config)
    output = capsys.readouterr().out
    assert output.count("train         finished before, reused") == 3  # CE, and TrimeLM at both budgets
    result = Table.model_validate_json((tmp_path / "table" / "table.json").read_text())
    assert {(row.budget, row.memory) for row in result.rows} == {
        ("equal steps", "none"), ("equal steps", "local"), ("equal steps", "ext"), ("equal time", "local"),
        ("equal time", "ext"),
    }  # fmt: skip
    assert {row.system for row in result.rows if row.memory == "none"} == {
        "plain", "cache_local", "cache", "knn", "knn_cache",
    }  # fmt: skip
    text = (tmp_path / "table" / "table.md").read_text()
    assert "**At equal steps**" in text and "**At equal time**" in text and "TrimeLM_ext" in text
    assert (tmp_path / "table" / "seed0_ext" / "report" / "report.html").exists()


def test_paces_are_kept_until_something_that_says_how_long_an_update_takes_changes(tmp_path: Path, monkeypatch):
    calls: list[tuple[set[str], int]] = []
    machine = {"speed": 1.0}

    def measured(configs, prepared, vocabulary):
        calls.append((set(configs), vocabulary))
        return {memory: machine["speed"] * {"none": 1.0, "local": 2.0, "long": 4.0}[memory] for memory in configs}

    class Prepared:
        def __init__(self, config) -> None: ...

        def path(self, stage: str) -> Path:
            return tmp_path

        def metrics(self, stage: str) -> dict[str, int]:
            return {"vocabulary": 9}

    monkeypatch.setattr(table, "seconds_per_update", measured)
    monkeypatch.setattr(table, "TrimeRun", Prepared)

    def budgets(*changes: str) -> dict[str, int]:
        overrides = ["train.updates=100", f"run_dir={tmp_path}", *changes]
        return table._equal_time(read_config(TrimeConfig, None, overrides), tmp_path)

    assert budgets("table.memories=[none, local]") == {"local": 50}
    assert budgets("table.memories=[none, local]", "train.updates=40") == {"local": 20}
    machine["speed"] = 3.0  # other work on the machine: what was measured stays, what is new is set against its `none`
    assert budgets("table.memories=[none, local, long]") == {"local": 50, "long": 25}
    assert budgets("table.memories=[none, local, long]", "batches.segment=64") == {"local": 50, "long": 25}
    assert calls == [({"none", "local"}, 9), ({"none", "long"}, 9), ({"none", "local", "long"}, 9)]
