"""Serve files build their applications; mistakes in them are named before anything starts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.data_owner.config import GenerateConfig, UnrollingConfig
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.data_owner.service.protocol import CompletionRequest
from pema_ray.data_owner.service.service import DataOwner, DecoderConfig
from pema_ray.errors import UserError
from pema_ray.pema.config import load_config
from pema_ray.pema.serving.local import LocalArgs
from pema_ray.pema.serving.run import application_of, arguments_of
from pema_ray.plm_owner.service.access import Access

CONFIGS = Path(__file__).parents[2] / "serve_configs"
APPLICATIONS = {
    "local": "pema_ray.pema.serving.local",
    "data_owner": "pema_ray.pema.serving.data_owner",
    "plm_owner": "pema_ray.plm_owner.service.application",
}


@pytest.mark.parametrize("topology", ["local", "cluster", "plm_owner", "data_owner"])
def test_every_serve_file_builds_its_application(topology: str):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load((CONFIGS / f"{topology}.yaml").read_text()))
    (application,) = schema.applications
    module, _, builder = application.import_path.partition(":")
    assert APPLICATIONS[builder] == module
    built = getattr(import_module(module), builder)(application.args)
    named = {"plm_owner": "PLMOwnerAPI", "trime": "Trime"}
    assert built._bound_deployment.name == named.get(builder, "DataOwner")


@pytest.mark.parametrize(
    ("builder", "args", "problem"),
    [
        ("local", {"live": {"adaptors": {}}}, "unknown key 'live.adaptors'"),
        ("local", {"engine": {"slot": 3}}, "unknown key 'engine.slot'"),
        ("local", {"decoder": {"lambda_max": 2}}, "decoder.lambda_max.*less than or equal to 1"),
        ("local", {"live": {"tasks": {"a": {"task": {"name": "a"}}}}}, "live.tasks.a.task.template.*Field required"),
        ("plm_owner", {}, "keys.*Field required"),
        ("data_owner", {}, "plm.*Field required"),
        ("data_owner", {"plm": {}}, r"args.plm: this application holds no weights: give plm.url or plm.serve"),
        ("data_owner", {"plm": {"name": "gpt2"}}, "pema_ray.pema.serving.local:local serves a PLM of one's own"),
        ("data_owner", {"plm": {"url": "https://a.b", "serve": "c"}}, "url and serve exclude each other"),
        ("data_owner", {"plm": {"url": "https://a.b", "threads": 2}}, "'threads' belongs to name"),
    ],
)
def test_mistakes_in_a_serve_file_are_named(builder, args, problem):
    with pytest.raises(UserError, match=problem):
        getattr(import_module(APPLICATIONS[builder]), builder)(args)


def test_lambda_has_one_declaration_for_stages_and_services():
    """A task's own settings, a service's and a request's that leaves them out agree."""
    for name, field in UnrollingConfig.model_fields.items():
        assert getattr(GenerateConfig(), name) == getattr(DecoderConfig(), name) == field.default
        assert name not in {*GenerateConfig.__annotations__, *DecoderConfig.__annotations__}
        assert CompletionRequest.model_fields[name].default is None
    assert LocalArgs().decoder == DecoderConfig()
    options = GenerateConfig()
    owner = DataOwner(lambda: pytest.fail("nothing is to be connected"))
    assert owner.schedule == UnrollingSchedule(options.lambda_max, options.schedule, options.floor)


@pytest.mark.parametrize(
    ("plm", "deployments"),
    [
        ({"name": "gpt2"}, {"DataOwner", "PLMEngine"}),
        ({"url": "https://plm.example.org"}, {"DataOwner"}),
        ({"serve": "shared"}, {"DataOwner"}),
    ],
)
def test_an_experiment_is_served_with_a_plm_owner_only_if_the_plm_is_its_own(plm, deployments):
    built = application_of({"plm": plm, "decoder": {"device": "cpu"}})
    arguments = built._bound_deployment.init_args
    bound = {a._bound_deployment.name for a in arguments if hasattr(a, "_bound_deployment")}
    assert {built._bound_deployment.name, *bound} == deployments


def test_an_experiment_without_an_adapter_is_not_served(tmp_path):
    with pytest.raises(UserError, match="no trained adapter. Run the experiment's stages up to train first"):
        arguments_of(load_config(None, [f"run_dir={tmp_path}"]))
    result = CliRunner().invoke(app, ["serve", f"run_dir={tmp_path}"])
    assert result.exit_code == 2
    assert CliRunner().invoke(app, ["serve", "--topology", str(tmp_path / "gone.yaml")]).exit_code == 2


def test_a_key_is_made_on_the_command_line(tmp_path):
    keys = tmp_path / "keys.yaml"
    result = CliRunner().invoke(app, ["serve-key", str(keys), "them", "--rows-per-minute", "500"])
    assert result.exit_code == 0
    account = Access(keys).account(f"Bearer {result.stdout.strip()}")
    assert (account.client.name, account.client.quota.rows_per_minute) == ("them", 500)
    assert CliRunner().invoke(app, ["serve-key", str(keys), "them", "--sessions", "-1"]).exit_code == 2
