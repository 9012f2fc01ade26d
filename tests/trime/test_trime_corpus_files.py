"""A corpus is known by its files: as they are, and of those that are gone, as they were when it was prepared."""

from __future__ import annotations

import os
from pathlib import Path

from pema_ray.trime.run import described


def test_a_file_that_is_gone_is_known_as_it_was(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        Path(name).write_text("words\n")
    before = described(names, None)
    assert [one[:2] for one in before] == [[name, 6] for name in names]
    Path(names[0]).unlink()
    assert described(names, before) == before
    assert described(names, None) == before[1:]


def test_a_file_that_changed_is_another_corpus_though_a_file_beside_it_is_gone(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        Path(name).write_text("words\n")
    before = described(names, None)
    Path(names[0]).unlink()
    Path(names[1]).write_text("other words\n")
    os.utime(names[1], ns=(0, before[1][2]))
    assert described(names, before) == [before[0], [names[1], 12, before[1][2]]]
