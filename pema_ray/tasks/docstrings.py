"""Functions of installed Python packages and the first sentence of their docstrings: code in, English out.

Nothing is imported or run: files are parsed. The texts stay under the packages' own licences.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pema_ray.errors import UserError

_SENTENCE = re.compile(r".+?\.(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|etc|resp|[A-Z])\.$")
_LEFT_OUT = {"tests", "_lib", "_externals"}
_MAX_SUMMARY = 160  # characters


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function.

    Attributes:
        module: dotted, such as `sympy.geometry.line`.
        checksum: the first 32 bits of its file's SHA-256.
        line: where it begins.
        code: without docstring, decorators and comments, as `ast.unparse` writes it.
        summary: the docstring's first sentence, on one line.
    """

    module: str
    checksum: int
    line: int
    code: str
    summary: str


def functions(package: str, max_characters: int) -> Iterator[Function]:
    """Documented functions and methods of an installed package, by file and line.

    Skips tests, and functions whose docstring does not begin with a sentence of at most 160 characters.

    Args:
        max_characters: of `code`; longer functions are left out.

    Raises:
        UserError: the package is not installed, or is not a folder of Python files.
    """
    root = _folder(package)
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(root).parts):
            continue
        contents = path.read_bytes()
        try:
            tree = ast.parse(contents)
        except (SyntaxError, ValueError):  # templates and files for other versions of Python
            continue
        module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
        checksum = int(hashlib.sha256(contents).hexdigest()[:8], 16)
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for node in sorted(nodes, key=lambda node: node.lineno):
            summary = first_sentence(ast.get_docstring(node) or "")
            if not 0 < len(summary) <= _MAX_SUMMARY:
                continue
            code = _undocumented(node)
            if 0 < len(code) <= max_characters:
                yield Function(module, checksum, node.lineno, code, summary)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line; empty if no full stop ends it."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    for end in (match.end() for match in _SENTENCE.finditer(paragraph)):
        if not _ABBREVIATION.search(paragraph[:end]):
            return paragraph[:end]
    return ""


def _undocumented(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The function's code without its docstring; empty if it holds nothing else."""
    body = node.body[1:]
    if not body:
        return ""
    bare = copy(node)
    bare.body, bare.decorator_list = body, []
    return ast.unparse(bare)


def _folder(package: str) -> Path:
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(f"The task's package '{package}' is not installed: pip install {package}.")
    if not spec.submodule_search_locations:
        raise UserError(f"The task's package '{package}' is a single file; source.docstrings needs a folder.")
    return Path(spec.submodule_search_locations[0])


def split_of(module: str, dev: tuple[str, ...], test: tuple[str, ...]) -> str:
    """The split of a module: that of its package."""
    for split, packages in (("dev", dev), ("test", test)):
        if any(module == package or module.startswith(package + ".") for package in packages):
            return split
    return "train"
