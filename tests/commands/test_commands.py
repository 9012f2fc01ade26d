"""The command line teaches, and fails politely."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.pema.config import ExperimentConfig

runner = CliRunner()


def test_a_published_checkpoint_becomes_an_adapter_and_nothing_is_overwritten(tiny_source, tmp_path):
    import torch

    from pema_ray.data_owner.adapter.pema import PemaAdapter

    bundle = tiny_source("llama").lm_head()
    bundle.save(tmp_path / "lm_head")
    A, B = torch.randn(4, bundle.card.hidden_size), torch.randn(bundle.card.hidden_size, 4)
    torch.save({"lora_A": A, "lora_B": B}, tmp_path / "stage3.pt")
    new = tmp_path / "adapter"
    command = ["import-adapter", str(tmp_path / "stage3.pt"), str(new), "--bundle", str(tmp_path / "lm_head")]
    assert runner.invoke(app, command).exit_code == 0
    adapter = PemaAdapter.from_pretrained(new, bundle.card)
    torch.testing.assert_close(adapter.B_pd, B / 4)
    assert runner.invoke(app, command).exit_code == 2


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
    output = runner.invoke(app, [command, "--help"]).output
    fields = ExperimentConfig.model_fields[section].annotation.model_fields
    assert fields and all(f"{section}.{name}" in output for name in fields)


def test_prepare_lists_the_shipped_tasks():
    output = runner.invoke(app, ["prepare", "--list"]).output
    assert all(name in output for name in ("bible_modern", "gyafc", "wmt22_en_de"))


def test_an_unknown_setting_is_exit_code_2(tmp_path):
    result = runner.invoke(app, ["prepare", f"run_dir={tmp_path}", "tsk.name=x"])
    assert result.exit_code == 2
