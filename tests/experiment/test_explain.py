"""`pema-ray config explain` knows every kind of file, and says of each setting what the stage will see."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.errors import UserError
from pema_ray.experiment.explain import ExplainedSetting, explain
from pema_ray.pema.method import PEMA
from pema_ray.pluglm.method import PLUGLM
from pema_ray.trime.method import TRIME
from pema_ray.trime.translation.method import TRANSLATION

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = (PEMA, TRIME, TRANSLATION, PLUGLM)
FILES = sorted(CONFIGS.rglob("*.yaml"))


def of(path: Path, *overrides: str) -> dict[str, ExplainedSetting]:
    return {one.key: one for one in explain(METHODS, path, overrides)[1]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_the_project_is_known_for_what_it_is(path: Path) -> None:
    method, settings = explain(METHODS, path)
    if path.parent.name == "pluglm":
        assert method is PLUGLM
        assert ("task.kind" in {one.key for one in settings}) == (path.stem == "classify")
    elif path.parent.name == "trime":
        assert method is (TRANSLATION if path.stem.startswith("mt_") else TRIME)
    else:
        assert method is PEMA
    assert all(one.read_by and one.meaning for one in settings)
    assert len({one.key for one in settings}) == len(settings)


def test_a_setting_has_its_value_its_default_and_its_readers(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {rank: 64}\ntask: {limits: {train: 5}}\n")
    found = of(path, "seed=3")
    assert found["train.rank"] == ExplainedSetting(
        "train.rank", "64", "512", "r, at most the PLM's hidden size.", ("train", "evaluate", "compare")
    )
    assert (found["seed"].value, found["seed"].default, len(found["seed"].read_by)) == ("3", "0", len(PEMA.stages))
    assert found["task.limits"].value == '{"train": 5}' and found["task.limits"].is_changed
    assert not found["train.epochs"].is_changed
    assert found["train.strategy"].meaning.startswith("(ddp | accelerate | deepspeed) ")
    assert {"build-memory", "train"} <= set(found["placement.strategy"].read_by)
    assert {"export-head", "build-memory", "generate", "evaluate", "compare"} <= set(found["plm.name"].read_by)


def test_nothing_is_changed_by_a_file_that_says_nothing(tmp_path: Path) -> None:
    """A default is what a setting is without a word about it, not what its section's class says."""
    path = tmp_path / "run.yaml"
    path.write_text("{}\n")
    assert not [one.key for one in of(path).values() if one.is_changed]
    path.write_text("index: {}\nbatches: {}\ndatastore: {}\n")  # TRIME's
    assert not [one.key for one in of(path).values() if one.is_changed]


def test_a_wrong_key_is_named_by_the_kind_that_knows_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batches: {}\ndatastore: {}\nevaluate: {strid: 3}\n")
    with pytest.raises(UserError, match=r"unknown key 'evaluate\.strid'"):
        explain(METHODS, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: []\n", "is a Serve file, for `serve run`"),
        ("name: mine\ntemplate: x\n", "is a task's definition.*task.name"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        explain(METHODS, path)


def test_keys_inside_sections_tell_methods_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {hide_local: 0.5}\n")
    assert explain(METHODS, path)[0] is TRIME
    path.write_text("train: {kappa: 0.1}\n")
    assert explain(METHODS, path)[0] is PEMA


def test_the_command_prints_what_has_changed() -> None:
    path = str(CONFIGS / "compare.yaml")
    whole, changed = (CliRunner().invoke(app, ["config", "explain", path, *more]) for more in ((), ("--changed",)))
    assert whole.exit_code == changed.exit_code == 0
    assert (
        "train.rank: 128  (default 512)\n    r, at most the PLM's hidden size. Read by train, evaluate, compare."
        in changed.output
    )
    assert "train.window_shards: 8\n" in whole.output and "train.window_shards" not in changed.output
    missing = CliRunner().invoke(app, ["config", "explain", "no/such.yaml"])
    assert missing.exit_code == 2 and "no/such.yaml: no such file" in missing.output
