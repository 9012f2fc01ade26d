"""The command line teaches, and fails politely."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pema_ray.cli import app
from pema_ray.config import ExperimentConfig

runner = CliRunner()
COMMANDS = ("quickstart", "prepare", "export-head", "build-memory", "train", "generate", "evaluate", "report")


def test_help_names_every_stage():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


def test_every_command_explains_overrides():
    for command in COMMANDS:
        result = runner.invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "SECTION.KEY=VALUE" in result.output


@pytest.mark.parametrize(
    ("command", "section"),
    [("prepare", "task"), ("export-head", "plm"), ("build-memory", "build_memory"), ("build-memory", "ray"),
     ("train", "train"), ("generate", "generate"), ("evaluate", "evaluate")],
)  # fmt: skip
def test_help_names_every_setting_of_its_stage(command: str, section: str):
    shown = runner.invoke(app, [command, "--help"]).output
    fields = ExperimentConfig.model_fields[section].annotation.model_fields
    assert fields and all(f"{section}.{name}" in shown for name in fields)


def test_prepare_lists_the_shipped_tasks():
    output = runner.invoke(app, ["prepare", "--list"]).output
    assert all(name in output for name in ("bible_modern", "gyafc", "wmt22_en_de"))


def test_an_unknown_setting_is_exit_code_2(tmp_path):
    result = runner.invoke(app, ["prepare", f"run_dir={tmp_path}", "tsk.name=x"])
    assert result.exit_code == 2
