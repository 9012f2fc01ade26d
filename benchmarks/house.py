"""The size and shape of the package: files, lines, rooms, arrows between rooms, circles, settings, copies.

    .venv/bin/python benchmarks/house.py [folder of the package]

A room is a folder or a file at the package's top. An arrow is a pair of rooms of which one imports the other; imports
for types alone do not count. A circle is a set of files that import each other. A copy is a stretch of at least six
lines, without blank lines and comments, that stands in two places. Writes nothing; `--json` prints figures alone.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_COPY = 6  # lines
_CONFIG_BASES = {"Section", "BaseModel"}


@dataclass(frozen=True)
class Module:
    """One file of the package; `name` is dotted, from the package on."""

    name: str
    text: str
    tree: ast.Module


def read_modules(package: Path) -> dict[str, Module]:
    """All files of a package by their dotted names."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text()
        modules[name] = Module(name, text, ast.parse(text))
    return modules


def imports_of(module: Module, names: set[str], at_import: bool = False) -> set[str]:
    """The package's modules that a module imports.

    Args:
        names: of all modules.
        at_import: leave out imports inside functions.
    """
    imports: set[str] = set()
    for node in _nodes(module.tree, at_import):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_nearest(name, names) for name in imports} & names - {module.name}


def _nodes(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _nodes(node, at_import)


def _nearest(name: str, names: set[str]) -> str:
    return name if name in names else name.rpartition(".")[0]


def room_of(name: str) -> str:
    """The room of a module: what stands after the package's name."""
    return (name.split(".") + ["(package)"])[1]


def arrows_between(modules: dict[str, Module]) -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    names = set(modules)
    pairs = {(room_of(a), room_of(b)) for a in names for b in imports_of(modules[a], names)}
    return {(a, b) for a, b in pairs if a != b and "(package)" not in (a, b)}


def circles_of(modules: dict[str, Module]) -> list[list[str]]:
    """Sets of modules that import each other while they are imported, by Tarjan's algorithm."""
    names = set(modules)
    graph = {name: imports_of(module, names, at_import=True) for name, module in modules.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for imported in graph[name]:
            if imported not in index:
                visit(imported)
                low[name] = min(low[name], low[imported])
            elif imported in stack:
                low[name] = min(low[name], index[imported])
        if low[name] == index[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return circles


def longest_function(modules: dict[str, Module]) -> tuple[int, str]:
    """Lines and name of the longest function."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return max(
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{module.name}.{node.name}")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, kinds)
    )


def settings_of(modules: dict[str, Module]) -> dict[str, int]:
    """Fields of every configuration class: one that derives from pydantic's `BaseModel`."""
    classes = {
        node.name: node
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }

    def is_config(name: str) -> bool:
        bases = [ast.unparse(base).split(".")[-1] for base in classes[name].bases] if name in classes else []
        return any(base in _CONFIG_BASES or is_config(base) for base in bases if base != name)

    return {
        name: sum(isinstance(line, ast.AnnAssign) for line in node.body)
        for name, node in classes.items()
        if is_config(name)
    }


def copies_of(modules: dict[str, Module], least: int = _COPY) -> list[tuple[int, str, str]]:
    """Stretches of lines that stand in two places: their length and both places, the longest first."""
    lines: dict[str, list[tuple[int, str]]] = {}
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for module in modules.values():
        stripped = [(n, line.strip()) for n, line in enumerate(module.text.splitlines(), 1)]
        kept = [(n, s) for n, s in stripped if s and not s.startswith(("#", "import ", "from "))]
        lines[module.name] = kept
        for start in range(len(kept) - least + 1):
            places[tuple(s for _, s in kept[start : start + least])].append((module.name, start))
    copies, seen = [], set()
    for occurrences in places.values():
        for i, (a, at) in enumerate(occurrences):
            for b, bt in occurrences[i + 1 :]:
                if (a, at - 1, b, bt - 1) not in seen and not _same(lines, a, at - 1, b, bt - 1):
                    length = 0
                    while _same(lines, a, at + length, b, bt + length):
                        length += 1
                    copies.append((length, f"{a}:{lines[a][at][0]}", f"{b}:{lines[b][bt][0]}"))
                seen.add((a, at, b, bt))
    return sorted(copies, reverse=True)


def _same(lines: dict[str, list[tuple[int, str]]], a: str, at: int, b: str, bt: int) -> bool:
    inside = 0 <= at < len(lines[a]) and 0 <= bt < len(lines[b])
    return inside and lines[a][at][1] == lines[b][bt][1]


def measure(package: Path) -> dict[str, object]:
    """All figures of a package."""
    modules = read_modules(package)
    sizes = {name: len(module.text.splitlines()) for name, module in modules.items()}
    rooms: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        rooms[room_of(name)] += size
    settings, copies = settings_of(modules), copies_of(modules)
    longest = max(sizes, key=lambda name: sizes[name])
    return {
        "files": len(modules),
        "lines": sum(sizes.values()),
        "rooms": len(rooms) - 1,
        "lines of rooms": dict(sorted(rooms.items(), key=lambda room: -room[1])),
        "arrows between rooms": len(arrows_between(modules)),
        "circles": circles_of(modules),
        "longest file": [sizes[longest], longest],
        "longest function": list(longest_function(modules)),
        "configuration classes": len(settings),
        "settings": sum(settings.values()),
        "copies of 6 lines and more": len(copies),
        "longest copies": copies[:10],
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="?", default=ROOT / "pema_ray")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures = measure(options.package)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for name, figure in figures.items():
        print(f"{name:28} {figure if not isinstance(figure, list | dict) else ''}")
        parts = figure.items() if isinstance(figure, dict) else figure if isinstance(figure, list) else ()
        for part in parts:
            print(f"  {part}")


if __name__ == "__main__":
    main()
