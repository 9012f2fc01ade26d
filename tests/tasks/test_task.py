"""A task is data: the shipped ones load, and the error of a broken one says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pema_ray.errors import UserError
from pema_ray.tasks import list_tasks, load_task


def test_the_shipped_tasks_load_under_their_own_name():
    assert list_tasks() == ["bible_middle_english", "bible_modern", "gyafc", "sympy_docstrings", "wmt22_en_de"]
    for name in list_tasks():
        task = load_task(name)
        assert task.name == name and task.description
        assert task.stop == ("\n",)


def test_the_published_templates_are_shipped_word_for_word():
    translate, formal = load_task("wmt22_en_de"), load_task("gyafc")
    assert translate.template.format(source="Hi.") == "Translate this from English to German: \nHi.\nGerman: "
    expected = "Convert the following informal sentence into a formal sentence: \nInformal: hi\nFormal: "
    assert formal.template.format(source="hi") == expected
    assert (translate.columns.source, translate.columns.target) == ("en", "du")
    assert (formal.columns.source, formal.columns.target) == ("informal", "formal")
    assert translate.sacrebleu_language == "de"


def test_an_unknown_task_names_the_nearest_and_all_shipped():
    with pytest.raises(UserError, match="Did you mean 'bible_modern'.*gyafc, sympy_docstrings, wmt22_en_de"):
        load_task("bible_moden")


def test_a_users_task_is_read_from_its_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntemplate: 'Q: {source} A:'\nsource: {files: {train: t.jsonl}}\n")
    task = load_task(str(path))
    assert (task.name, task.columns.source, task.postprocess) == ("mine", "source", ())
    assert task.source.files == {"train": "t.jsonl"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("name: x\n", "'template': Field required"),
        ("name: x\ntemplate: no field\n", "must contain {source} and no other"),
        ("name: x\ntemplate: '{source} {target}'\n", "no other field"),
        ("name: x\ntemplate: '{source'\n", "not a template"),
        ("name: x\ntemplate: '{source}'\nchat_user: '{}'\n", "'chat_user'"),
        ("name: x\ntemplate: '{source}'\narchaic_pattern: '('\n", "not a regular expression"),
        (
            "name: x\ntemplate: '{source}'\npostprocess: [first_lin]\n",
            "unknown rule 'first_lin'. Did you mean 'first_line'",
        ),
        ("name: x\ntemplat: '{source}'\n", "templat"),
        ("name: x\ntemplate: '{source}'\ncolumns: {sorce: a}\n", "unknown key 'columns.sorce'. Did you mean 'source'"),
        ("name: [\n", "broken YAML"),
        ("", "Field required"),
    ],
)
def test_a_broken_task_file_says_what_is_wrong(content: str, complaint: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_task(str(path))
    assert complaint in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_task_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="gone.yaml: no such file"):
        load_task(str(tmp_path / "gone.yaml"))
