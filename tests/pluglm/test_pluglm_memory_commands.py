"""`pema-ray pluglm memory …`: edits from the command line, mistakes as one line and exit code 2."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pema_ray.commands.pluglm import memory_app as commands
from pema_ray.errors import UserError
from pema_ray.pluglm.memory.entries import read_entries
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory


@pytest.fixture
def run(tmp_path, model, words_tokenizer, encoder, facts):
    """`run(*arguments)` → exit code, in a folder with `model` and `memory`."""
    model.save_pretrained(tmp_path / "model")
    words_tokenizer.save_pretrained(tmp_path / "model")
    KnowledgeMemory.build(tmp_path / "memory", facts, encoder)

    def call(command: str, *arguments: str, with_model: bool = False) -> int:
        model_option = ["--model", str(tmp_path / "model")] if with_model else []
        return CliRunner().invoke(commands, [command, str(tmp_path / "memory"), *arguments, *model_option]).exit_code

    return call


def test_a_memory_is_edited_shown_and_verified(run, tmp_path) -> None:
    rows = tmp_path / "new.jsonl"
    rows.write_text(json.dumps({"text": "w8 w9", "source": "file", "tags": ["x"]}) + "\n\n")
    assert run("add", "--text", "w7", "--source", "me", "--tag", "y", "--file", str(rows), with_model=True) == 0
    assert run("replace", "3", "--text", "w90 w91", with_model=True) == 0
    assert run("delete", "0", "1", "--only-on", "3") == 0
    assert run("delete", "2", "--only-on", "3") == 2
    assert run("concat", str(tmp_path / "memory")) == 0
    assert run("swap", str(tmp_path / "memory"), "--version", "4") == 0
    now = {entry.entry_id: entry for entry in KnowledgeMemory.open(tmp_path / "memory").entries()}
    assert sorted(now) == list(range(2, 14))
    assert (now[3].text, now[3].source, now[3].document_id) == ("w90 w91", "a", "doc1")
    assert (now[12].source, now[12].tags, now[13].source, now[13].tags) == ("me", ("y",), "file", ("x",))
    for command in ("show", "verify", "prune"):
        assert run(command) == 0
    assert run("refresh", "--workers", "0", with_model=True) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "w1"}', "line 2: no entry: got an unexpected keyword argument 'txt'"),
        ("{", "line 2: no entry"),
        ('{"text": "a", "tags": "x"}', "tags a list"),
    ],
)
def test_lines_that_are_no_entries_are_named(tmp_path, line, message) -> None:
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "w1"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_entries(rows)


def test_mistakes_are_told_in_a_line(run, tmp_path) -> None:
    assert run("delete", "77") == 2
    assert run("swap", str(tmp_path / "nowhere")) == 2
    assert run("show", "--version", "9") == 2
    next((tmp_path / "memory").glob("vectors-*")).unlink()
    assert run("verify") == 2
