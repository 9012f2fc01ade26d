"""Inputs are identified by content: read again only when they change, and remembered when they are gone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pema_ray.experiment import input_files
from pema_ray.experiment.input_files import InputFiles


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    read = input_files.sha256_of
    monkeypatch.setattr(input_files, "sha256_of", lambda path: names.append(path.name) or read(path))
    return names


def test_a_file_is_read_again_only_when_size_or_time_has_changed(tmp_path: Path, reads: list[str]):
    file, run = tmp_path / "train.jsonl", tmp_path / "run"
    run.mkdir()
    file.write_text("one")
    first = InputFiles(run)
    assert first.sha256(file) == first.sha256(str(file)) == sha256("one") and reads == ["train.jsonl"]
    first.save()
    assert InputFiles(run).sha256(file) == sha256("one") and len(reads) == 1  # a later process reads its record
    file.write_text("two")
    os.utime(file, ns=(1, 1))  # an older time, as a restored copy has
    assert InputFiles(run).sha256(file) == sha256("two") and len(reads) == 2
    os.utime(file, ns=(2, 2))
    assert InputFiles(run).sha256(file) == sha256("two") and len(reads) == 3  # touched: another time, the same content


def test_a_file_that_is_gone_counts_as_it_was(tmp_path: Path):
    file, run = tmp_path / "train.jsonl", tmp_path / "run"
    run.mkdir()
    file.write_text("one")
    seen = InputFiles(run)
    assert seen.sha256(file) == sha256("one")
    seen.save()
    file.unlink()
    assert InputFiles(run).sha256(file) == sha256("one")
    assert InputFiles(run).sha256(tmp_path / "never.jsonl") is None


def test_a_folder_is_its_files_names_and_contents(tmp_path: Path):
    folder, inputs = tmp_path / "text", InputFiles(tmp_path)
    (folder / "part").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "part" / "b").write_text("two")
    checksums = [inputs.sha256(folder)]
    for change in (
        lambda: (folder / "part" / "b").write_text("three"),
        lambda: (folder / "a").rename(folder / "c"),
        lambda: (folder / "part" / "d").touch(),
    ):
        change()
        checksums.append(inputs.sha256(folder))
    assert len(set(checksums)) == 4
    (folder / "part" / "d").unlink()
    assert inputs.sha256(folder) == checksums[2]


def test_a_record_that_is_no_json_is_made_anew(tmp_path: Path):
    (tmp_path / "inputs.json").write_text("{")
    (tmp_path / "a").write_text("one")
    inputs = InputFiles(tmp_path)
    assert inputs.sha256(tmp_path / "a") == sha256("one")
    inputs.save()
    assert InputFiles(tmp_path).sha256(tmp_path / "a") == sha256("one")
