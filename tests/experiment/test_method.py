"""A method's table is true: modules run, parents and settings exist, and every stage can be submitted as a job."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.commands.stages import add_stages
from pema_ray.errors import UserError
from pema_ray.experiment.method import Method, Stage
from pema_ray.experiment.stage_run import StageRun
from pema_ray.pema.method import PEMA
from pema_ray.pluglm.method import PLUGLM
from pema_ray.runtime.settings import Section
from pema_ray.trime.method import TRIME
from pema_ray.trime.translation.method import TRANSLATION

ROOT = Path(__file__).parents[2]
METHODS = {"PEMA": PEMA, "TRIME": TRIME, "TRANSLATION": TRANSLATION, "PLUGLM": PLUGLM}
STAGES = [(name, stage) for name, method in METHODS.items() for stage in method.stages]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_what_a_table_names_exists(name: str, stage: str):
    method = METHODS[name]
    one = method.stages[stage]
    if one.module is not None:
        assert callable(import_module(one.module).run)
    assert set(one.parents) <= method.stages.keys()
    for setting in (*one.reads, *one.depends_on):
        model: type[BaseModel] = method.config_of(stage)
        for part in setting.split("."):
            model = model.model_fields[part].annotation  # type: ignore[assignment]
    method.read(stage, ROOT / method.example_of(stage))


def test_a_chain_does_parents_first():
    for method in METHODS.values():
        order = list(method.stages)
        for stage in method.stages:
            assert all(order.index(parent) < order.index(stage) for parent in method.stages[stage].parents)


def test_every_job_is_a_stage_and_says_so_in_its_name():
    for script in (ROOT / "jobs").glob("*.py"):
        [(name, stage)] = re.findall(r'^    (\w+)\.job\("(\w+)"\)$', script.read_text(), re.M)
        assert METHODS[name].stages[stage].module is not None
        prefix = {"PEMA": "", "TRIME": "trime_", "TRANSLATION": "trime_mt_", "PLUGLM": "pluglm_"}[name]
        assert script.stem in (prefix + stage, prefix + stage + "_adapter")


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_command_helps_with_the_settings_it_reads(name: str, stage: str):
    method = METHODS[name]
    _, *command = method.command(stage).split()
    page = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert page.exit_code == 0
    if method.stages[stage].module is not None:
        assert method.stages[stage].does in " ".join(page.output.split())
        for setting in method.settings_of(stage):
            assert setting.key in page.output, setting
            assert setting.meaning and not setting.meaning.endswith(") "), f"{setting.key} has no meaning"


class Tea(Section):
    """Sections of a fourth method."""

    leaves: int = 2
    """Grams."""


class TeaConfig(Section):
    run_dir: str = "runs/tea"
    seed: int = 0
    tea: Tea = Tea()


class TeaRun(StageRun[TeaConfig]):
    method = Method(
        "pema-ray tea",
        TeaConfig,
        "configs/tea.yaml",
        {
            "boil": Stage("Boil the water.", "tests.experiment.test_method", evidence=("kettle",)),
            "brew": Stage("Brew.", __name__, reads=("tea",), depends_on=("tea",), parents=("boil",)),
        },
    )


def run(config: TeaConfig) -> dict[str, object]:
    """Both stages of the fourth method."""
    here = TeaRun(config)
    if here.finished("boil") is None:

        def boil() -> dict[str, object]:
            here.path("boil", "kettle").touch()
            return {"summary": "hot"}

        return here.perform("boil", boil)
    return here.perform("brew", lambda: {"summary": f"{config.tea.leaves} g"})


def test_a_fourth_method_is_a_table(tmp_path):
    """Commands, settings, reuse, refusals and messages, without a line elsewhere."""
    commands = typer.Typer()
    add_stages(commands, TeaRun.method)
    path = tmp_path / "tea.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n")

    def invoke(*arguments: str) -> int:
        return CliRunner().invoke(commands, [*arguments, "--config", str(path)]).exit_code

    with pytest.raises(UserError, match="'boil' has not been run yet. Run: pema-ray tea boil"):
        TeaRun(TeaRun.method.read("brew", path)).perform("brew", lambda: {"summary": ""})
    assert [invoke("boil"), invoke("brew"), invoke("brew", "tea.leaves=3")] == [0, 0, 0]
    assert invoke("brew", "tea.leafs=3") == 2
    here = TeaRun(TeaRun.method.read("brew", path, ["tea.leaves=3"]))
    assert here.metrics("brew")["summary"] == "3 g"
    with pytest.raises(UserError, match="with other settings than this run's. Run it again: pema-ray tea brew"):
        TeaRun(TeaRun.method.read("brew", path)).metrics("brew")
    here.path("boil", "kettle").unlink()
    assert here.finished("boil") is None
