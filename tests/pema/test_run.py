"""A run folder: answers survive any text, and a stage is refused when anything it was made from was replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.errors import UserError
from pema_ray.experiment.stage_run import claim
from pema_ray.pema.config import load_config
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import Run
from pema_ray.pema.stages.answers import read_rows, write_rows
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.run import TrimeRun


def test_answers_with_unicode_line_separators_are_read_back(tmp_path):
    rows = [{"answer": "a\u2028b\u2029c\u0085d\ne"}, {"answer": "ä"}]
    write_rows(tmp_path / "answers.jsonl", rows)
    assert read_rows(tmp_path / "answers.jsonl") == rows


def test_a_stage_is_refused_when_a_far_ancestor_was_replaced(experiment):
    path = experiment()
    run = Run(load_config(path))
    for stage in PEMA.chain:
        if stage != "generate":
            run.path(stage).mkdir(parents=True)
            run.path(stage, "metrics.json").write_text(f'{{"stamp": "{run.stamp(stage)}", "summary": ""}}')
    replaced = Run(load_config(path, ["task.limits.test=2"])).stamp("prepare")
    run.path("prepare", "metrics.json").write_text(f'{{"stamp": "{replaced}", "summary": ""}}')
    with pytest.raises(UserError, match="stage 'prepare' was run with other settings"):
        run.perform("generate", lambda: {"summary": ""})


def finished_run(experiment) -> Run:
    """A run whose `prepare` is done, with metrics and evidence."""
    run = Run(load_config(experiment()))
    run.path("prepare").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        run.path("prepare", f"{split}.parquet").touch()
    run.path("prepare", "metrics.json").write_text(f'{{"stamp": "{run.stamp("prepare")}", "summary": ""}}')
    return run


def test_a_stage_whose_result_was_deleted_is_not_finished(experiment):
    run = finished_run(experiment)
    assert run.finished("prepare")
    run.path("prepare", "dev.parquet").unlink()
    assert run.finished("prepare") is None


def test_a_refused_stage_keeps_the_metrics_of_the_run_before(experiment):
    run = finished_run(experiment)
    before = b'{"stamp": "of other settings", "summary": ""}'
    run.path("prepare", "metrics.json").write_bytes(before)

    def refuse():
        assert not run.path("prepare", "metrics.json").exists()  # a stage under way has none
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run.perform("prepare", refuse)
    assert run.path("prepare", "metrics.json").read_bytes() == before

    def refuse_having_begun():
        run.path("prepare", "dev.parquet").unlink()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run.perform("prepare", refuse_having_begun)
    assert not run.path("prepare", "metrics.json").exists()  # of a result that is no longer there

    run.path("prepare", "dev.parquet").touch()
    with pytest.raises(KeyboardInterrupt):
        run.perform("prepare", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not run.path("prepare", "metrics.json").exists()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoint_is_taken_up_under_the_settings_that_wrote_it_and_never_deleted(tmp_path):
    """Of `train`, and of every variant that `compare` trains."""
    folder = tmp_path / "train"
    claim(folder, "pema one")
    (folder / "checkpoint.safetensors").write_text("one")
    claim(folder, "pema one")
    assert names_in(folder) == {"stamp", "checkpoint.safetensors"}
    claim(folder, "pema another", metrics="{}")
    assert names_in(folder) == {"stamp"}
    assert names_in(tmp_path / "train.before-1") == {"stamp", "checkpoint.safetensors", "metrics.json"}
    (folder / "checkpoint.safetensors").write_text("another")
    claim(folder, "pema one")  # the set-aside folder comes back
    assert (folder / "checkpoint.safetensors").read_text() == "one"
    assert names_in(tmp_path) == {"train", "train.before-2"}
    claim(folder, "pema nothing made yet")
    claim(folder, "pema one")
    assert names_in(tmp_path) == {"train", "train.before-2"} and names_in(folder) >= {"checkpoint.safetensors"}
    (folder / "stamp").unlink()  # its owner is unknown now
    claim(folder, "pema another")
    assert (folder / "checkpoint.safetensors").read_text() == "another"
    assert (tmp_path / "train.before-3" / "checkpoint.safetensors").read_text() == "one"


def test_a_refused_training_keeps_the_adapter_and_one_that_begins_sets_it_aside(experiment):
    run = Run(load_config(experiment()))
    for stage in ("prepare", "export_head", "build_memory", "train"):
        run.path(stage).mkdir(parents=True)
        run.path(stage, "metrics.json").write_text(f'{{"stamp": "{run.stamp(stage)}", "summary": ""}}')
    run.path("train", "adapter").mkdir()
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "history.json"):
        run.path("train", name).touch()
    before = '{"stamp": "of other settings", "summary": ""}'
    run.path("train", "metrics.json").write_text(before)
    adapter = run.path("train", "adapter", "adapter_model.safetensors")

    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run.perform("train", refuse)
    assert adapter.exists() and run.path("train", "metrics.json").read_text() == before

    def begin_and_fail():
        run.claim("train")
        assert not adapter.exists()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        run.perform("train", begin_and_fail)
    aside = run.path("train.before-1")
    assert (aside / "adapter" / adapter.name).exists() and (aside / "metrics.json").read_text() == before


def test_a_finished_result_that_was_set_aside_is_reused_when_its_settings_come_back(tmp_path):
    """Of a kind of experiment that claims a stage's folder as soon as the stage begins, as TRIME's do."""
    trainings: list[int] = []

    class Alone(TrimeRun):
        def parents(self, stage: str) -> tuple[str, ...]:
            return ()

    def finish(updates: int) -> dict[str, Any]:
        run = Alone(TrimeConfig(run_dir=str(tmp_path), train={"updates": updates}))

        def work() -> dict[str, Any]:
            trainings.append(updates)
            run.path("train", "model").mkdir()
            for name in run.evidence("train"):
                run.path("train", name).touch()
            return {"summary": "", "updates": updates}

        return run.perform("train", work)

    first = finish(7)
    assert finish(8)["updates"] == 8
    assert finish(7) == first and trainings == [7, 8]
    assert finish(8)["updates"] == 8 and trainings == [7, 8]


def test_a_new_setting_with_its_default_changes_no_stamp(experiment):
    """A release that brings one must not make anybody's finished stages look as if they had other settings."""

    class Later(TrainConfig):
        brought_by_a_release: int = 3

    config = load_config(experiment())
    changed = {"rank": 7, "epochs": 2}
    stamps = [
        Run(config.model_copy(update={"train": section})).stamp("train")
        for section in (TrainConfig(**changed), Later(**changed), Later(**changed, brought_by_a_release=4))
    ]
    assert stamps[0] == stamps[1] != stamps[2]


@pytest.mark.parametrize("setting", ["labels={pool: gpu}", "accelerator_type=H100", "strategy=SPREAD"])
def test_where_stages_run_changes_no_stamp(setting: str, experiment):
    path = experiment()
    local, placed = (Run(load_config(path, overrides)) for overrides in ([], [f"placement.{setting}"]))
    assert [local.stamp(stage) for stage in PEMA.chain] == [placed.stamp(stage) for stage in PEMA.chain]


@pytest.mark.parametrize(
    "setting",
    ["dtype=bfloat16", "revision=v2", "attn_implementation=eager", "quantization={load_in_8bit: true}",
     "device_map={'': cpu}"],
)  # fmt: skip
def test_how_the_plm_computes_is_in_the_stamps_of_all_that_is_made_of_it(setting: str, experiment):
    path = experiment()
    before, after = (Run(load_config(path, overrides)) for overrides in ([], [f"plm.{setting}"]))
    differing = [stage for stage in PEMA.chain if before.stamp(stage) != after.stamp(stage)]
    assert differing == [stage for stage in PEMA.chain if stage != "prepare"]


def test_the_number_of_workers_changes_no_stamp(experiment):
    path = experiment()
    single, two = (Run(load_config(path, [f"train.workers={n}"])).stamp("train") for n in (1, 2))
    assert single == two
