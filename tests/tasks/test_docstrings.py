"""Pairs of code and docstring come from installed packages by parsing alone, and no code is in two splits."""

from __future__ import annotations

import textwrap

import pytest

from pema_ray.errors import UserError
from pema_ray.tasks import load_pairs, load_task
from pema_ray.tasks.docstrings import first_sentence, functions, split_of
from pema_ray.tasks.sources import name_of_example
from pema_ray.tasks.task import PackageSplit, Source, Task


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose import would fail: it must only be parsed."""
    files = {
        "__init__.py": "raise RuntimeError('nobody runs this')\n",
        "shapes/area.py": '''
            @decorated
            def area(a, b):
                """Return the area,
                in square metres.  Negative sides are refused.

                More words.
                """
                return a * b  # a comment

            def undocumented(x):
                return x

            def empty():
                """Do nothing."""

            class Square:
                async def side(self):
                    """The side, e.g. of a tile."""
                    return self._side
        ''',
        "shapes/copies.py": '''
            def area(a, b):
                """Multiply."""
                return a * b
        ''',
        "waves/sound.py": 'def pitch(f):\n    "Give the pitch."\n    return f\n',
        "tests/test_area.py": 'def test_area():\n    """Areas are right."""\n    assert area(1, 2) == 2\n',
        "broken.py": "def broken(:\n",
        "heat.py": 'def warm(t):\n    "Say whether it is warm."\n    return t > 20\n',
    }
    for name, text in files.items():
        path = tmp_path / "physics_of_tiles" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    return "physics_of_tiles"


def task_of(package: str, dev: str, test: str, **settings: int) -> Task:
    split = PackageSplit(packages=(package,), dev=(dev,), test=(test,), **settings)
    return Task(name="docs", template="{source}", source=Source(docstrings=split))


def test_documented_functions_are_read_and_never_run(package):
    read = {(f.module.removeprefix(package + "."), f.code): f.summary for f in functions(package, 300)}
    assert read == {
        ("shapes.area", "def area(a, b):\n    return a * b"): "Return the area, in square metres.",
        ("shapes.area", "async def side(self):\n    return self._side"): "The side, e.g. of a tile.",
        ("shapes.copies", "def area(a, b):\n    return a * b"): "Multiply.",
        ("waves.sound", "def pitch(f):\n    return f"): "Give the pitch.",
        ("heat", "def warm(t):\n    return t > 20"): "Say whether it is warm.",
    }


def test_longer_functions_are_left_out(package):
    assert [f.code for f in functions(package, 26)] == ["def pitch(f):\n    return f"]


def test_the_same_code_is_one_pair_in_one_split(package):
    splits = load_pairs(task_of(package, f"{package}.waves", f"{package}.shapes"))
    assert {split: sorted(pair.target for pair in pairs) for split, pairs in splits.items()} == {
        "train": ["Say whether it is warm."],
        "dev": ["Give the pitch."],
        "test": ["Return the area, in square metres.", "The side, e.g. of a tile."],
    }


def test_an_example_is_named_by_line_and_file(package):
    [pitch] = [f for f in functions(package, 300) if f.module.endswith("sound")]
    [pair] = load_pairs(task_of(package, f"{package}.waves", f"{package}.shapes"))["dev"]
    assert name_of_example(pair.example_id) == f"the example of line 1 of the file {pitch.checksum:08x}…"


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("Over\n   two lines.\n\nMore.", "Over two lines."),
        ("Norms, i.e. lengths, cf. Sec. 2.", "Norms, i.e. lengths, cf. Sec."),
        ("By S. Lie in 1870. More.", "By S. Lie in 1870."),
        ("Version 1.2 of it.", "Version 1.2 of it."),
        ("No full stop", ""),
        ("A list::\n\n    x.", ""),
        ("", ""),
    ],
)
def test_the_first_sentence(docstring: str, sentence: str):
    assert first_sentence(docstring) == sentence


def test_a_split_is_of_whole_packages():
    assert split_of("sympy.geometry.line", ("sympy.geometry",), ()) == "dev"
    assert split_of("sympy.geometry_of_lines", ("sympy.geometry",), ("sympy",)) == "test"
    assert split_of("sympy.geometry", ("sympy.geometry",), ()) == "dev"
    assert split_of("sympyx", (), ("sympy",)) == "train"


def test_what_is_missing_is_named(package):
    with pytest.raises(UserError, match="package 'tiles_of_physics' is not installed: pip install tiles_of_physics"):
        load_pairs(task_of("tiles_of_physics", "a", "b"))
    with pytest.raises(UserError, match="'this' is a single file"):
        load_pairs(task_of("this", "a", "b"))
    with pytest.raises(UserError, match=r"no function of physics_of_tiles is left for 'dev'"):
        load_pairs(task_of(package, f"{package}.optics", f"{package}.waves"))
    with pytest.raises(ValueError, match="give bible or docstrings, not both"):
        Source.model_validate(
            {"bible": {"dev": [], "test": []}, "docstrings": {"packages": ["a"], "dev": [], "test": []}}
        )


def test_the_shipped_task_has_three_splits_without_common_code():
    pytest.importorskip("scipy")
    splits = load_pairs(load_task("sympy_docstrings"))
    sizes = {split: len(pairs) for split, pairs in splits.items()}
    assert sizes["train"] > 4000 and sizes["dev"] > 200 and sizes["test"] > 400, sizes
    codes = [pair.source for pairs in splits.values() for pair in pairs]
    assert len(set(codes)) == len(codes)
    ids = [pair.example_id for pairs in splits.values() for pair in pairs]
    assert len(set(ids)) == len(ids) and max(ids) < 2**63
