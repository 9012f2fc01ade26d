"""The documentation speaks of what is there: files, modules, links, and a reading path of the length it claims."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name not in ("CHANGELOG.md", "log.md")]
PACKAGE = ROOT / "pema_ray"
FILES = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
SOURCES = list(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_modules_that_a_page_names_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.<*-])([\w]+(?:/\w+)*\.py)\b", text)
    assert not [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)]
    modules = re.findall(r"\bpema_ray((?:\.[a-z_]+)+)", text)
    assert not [module for module in modules if not _is_there(module[1:].split("."))]


def test_files_that_a_file_names_exist():
    """In the first lines of each."""
    for source in SOURCES:
        first = re.match(r'"""(.*?)"""', source.read_text(encoding="utf-8"), re.S)
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", first[1] if first else ""):
            assert any(f"/{file}".endswith(f"/{name}") for file in FILES), f"{source}: {name}"


def _is_there(parts: list[str]) -> bool:
    """Whether this is a room, a module, or a name in one."""
    path = PACKAGE.joinpath(*parts)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    *above, name = parts
    module = PACKAGE.joinpath(*above)
    source = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
    return source.is_file() and re.search(rf"\b{name}\b", source.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name) if name else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M)
            anchors = {
                re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).replace(" ", "-")
                for heading in headings
            }
            assert anchor in anchors, target


def test_the_reading_path_is_as_long_as_it_says():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    path = text.partition("## Where to begin reading")[2].partition("\n## ")[0]
    total = 0
    for row in re.findall(r"^\| (`.+) \| (\d+) \|", path, re.M):
        folder, lines = "", 0
        for name in re.findall(r"`([\w/]+\.py)`", row[0]):
            folder, _, file = name.rpartition("/") if "/" in name else (folder, "", name)
            lines += len((PACKAGE / folder / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(row[1])) <= 0.1 * lines, (row, lines)
        total += lines
    assert total <= 3600
