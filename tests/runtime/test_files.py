"""Files are written atomically, also by concurrent writers, and one process at a time works in a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pema_ray.errors import UserError
from pema_ray.runtime.files import atomic_file, one_process


def test_writers_of_one_file_do_not_disturb_each_other_whatever_their_process_number(tmp_path: Path):
    path = tmp_path / "result.json"
    with atomic_file(path) as first, atomic_file(path) as second:
        assert first != second and first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "result.json"
    path.write_text("before")
    refused = pytest.raises(UserError, match=r"result.json: cannot be written: No space left.*what is finished is kept")
    with refused, atomic_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_second_process_is_told_who_works_in_a_folder_and_a_dead_one_keeps_nobody_out(tmp_path: Path):
    folder = tmp_path / "train"
    program = f"""
from pathlib import Path
from pema_ray.runtime.files import one_process
with one_process(Path({str(folder)!r})):
    print("locked", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        refused = pytest.raises(UserError, match=rf"{folder}: process {process.pid} on .* is working there. Wait")
        with refused, one_process(folder):
            pass
        process.kill()
        process.wait()
        with one_process(folder):
            folder.mkdir()
    with one_process(folder):
        with one_process(folder):  # a build inside its stage takes the lock again
            assert folder.is_dir()
        assert (tmp_path / ".train.lock").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_without_locks_has_none(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with one_process(tmp_path / "a"), one_process(tmp_path / "a"):
        pass
