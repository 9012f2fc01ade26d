"""A run folder: answers survive any text, and a stage is refused when anything it was made from was replaced."""

from __future__ import annotations

import pytest

from pema_ray.config import load_config
from pema_ray.errors import UserError
from pema_ray.stages.answers import read_rows, write_rows
from pema_ray.stages.run import STAGES, Run
from pema_ray.stages.train import forget_other_settings


def test_answers_with_unicode_line_separators_are_read_back(tmp_path):
    rows = [{"answer": "a\u2028b\u2029c\u0085d\ne"}, {"answer": "ä"}]
    write_rows(tmp_path / "answers.jsonl", rows)
    assert read_rows(tmp_path / "answers.jsonl") == rows


def test_a_stage_is_refused_when_a_far_ancestor_was_replaced(experiment):
    path = experiment()
    run = Run(load_config(path))
    for stage in STAGES:
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


def test_a_checkpoint_is_taken_up_under_the_settings_that_wrote_it_alone(tmp_path):
    """Of `train`, and of every variant that `compare` trains."""
    folder = tmp_path / "train"
    forget_other_settings(folder, "pema one")
    (folder / "checkpoint.safetensors").touch()
    forget_other_settings(folder, "pema one")
    assert (folder / "checkpoint.safetensors").exists()
    forget_other_settings(folder, "pema another")
    assert [path.name for path in folder.iterdir()] == ["stamp"]
    (folder / "stamp").unlink()
    (folder / "checkpoint.safetensors").touch()
    forget_other_settings(folder, "pema another")
    assert [path.name for path in folder.iterdir()] == ["stamp"]
