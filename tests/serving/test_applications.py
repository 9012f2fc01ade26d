"""Serve files say what builders take; mistakes in them are told in words before anything starts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pema_ray.cli import app
from pema_ray.config import load_config
from pema_ray.errors import UserError
from pema_ray.plm_owner.access import Access
from pema_ray.serving import applications
from pema_ray.serving.run import arguments_of

CONFIGS = Path(__file__).parents[2] / "serve_configs"


@pytest.mark.parametrize("topology", ["local", "cluster", "plm_owner", "data_owner"])
def test_every_serve_file_builds_its_application(topology: str):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((CONFIGS / f"{topology}.yaml").read_text()))
    (application,) = schema.applications
    module, _, builder = application.import_path.partition(":")
    assert module.startswith("pema_ray.serving.")
    built = getattr(import_module(module), builder)(application.args)
    named = {"plm_owner": "PLMOwnerAPI", "trime": "Trime"}
    assert built._bound_deployment.name == named.get(builder, "DataOwner")


@pytest.mark.parametrize(
    ("builder", "args", "problem"),
    [
        ("local", {"live": {"adaptors": {}}}, "unknown key 'live.adaptors'"),
        ("local", {"engine": {"slot": 3}}, "unknown key 'engine.slot'"),
        ("local", {"unroller": {"lambda_max": 2}}, "unroller.lambda_max.*less than or equal to 1"),
        ("plm_owner", {}, "keys.*Field required"),
        ("data_owner", {"line": {}}, "line.url.*Field required"),
    ],
)
def test_mistakes_in_a_serve_file_are_told_in_words(builder, args, problem):
    with pytest.raises(UserError, match=problem):
        getattr(applications, builder)(args)


def test_an_experiment_without_an_adapter_is_not_served(tmp_path):
    with pytest.raises(UserError, match="there is no trained adapter. Run the experiment's stages up to train first"):
        arguments_of(load_config(None, [f"run_dir={tmp_path}"]))
    found = CliRunner().invoke(app, ["serve", f"run_dir={tmp_path}"])
    assert found.exit_code == 2
    assert CliRunner().invoke(app, ["serve", "--topology", str(tmp_path / "gone.yaml")]).exit_code == 2


def test_a_key_is_made_on_the_command_line(tmp_path):
    keys = tmp_path / "keys.yaml"
    found = CliRunner().invoke(app, ["serve-key", str(keys), "them", "--rows-per-minute", "500"])
    assert found.exit_code == 0
    account = Access(keys).account(f"Bearer {found.stdout.strip()}")
    assert (account.client.name, account.client.quota.rows_per_minute) == ("them", 500)
    assert CliRunner().invoke(app, ["serve-key", str(keys), "them", "--sessions", "-1"]).exit_code == 2
