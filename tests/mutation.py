"""Changes the mathematics of PEMA one operator at a time and lists the changes that no test notices: `make mutation`.

Works on a copy, so that sources are never touched. Needs `cosmic-ray`; a module takes ten minutes to an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_TESTS = {  # of each module, those that are to notice
    "data_owner/adapter/pema": ["data_owner/adapter/test_adapter.py"],
    "data_owner/training/reconstruction": ["data_owner/training/test_reconstruction.py"],
    "data_owner/training/objectives": ["data_owner/training/test_objectives.py"],
    "data_owner/decoding/unrolling": ["data_owner/decoding/test_unrolling.py"],
    "data_owner/training/batch_samplers": ["data_owner/training/test_batch_samplers.py"],
    "memory/rows": ["memory/test_rows.py"],
    "memory/plan": ["memory/test_plan.py"],
}
_CONFIG = """\
[cosmic-ray]
module-path = "pema_ray/{module}.py"
timeout = 120.0
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider -m 'not slow and not cluster and not gpu' {tests}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""
_LEFT_OUT = [  # what ends in a TypeError for numbers that are not whole, and the `|` of types
    "core/ReplaceBinaryOperator_.*_(RShift|LShift|BitOr|BitAnd|BitXor|Mod|Pow|FloorDiv)",
    "core/ReplaceBinaryOperator_BitOr_.*",
    "core/ReplaceComparisonOperator_(?!Is).*_Is(Not)?",
    "core/RemoveDecorator",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(_TESTS), metavar="MODULE", help=f"of {', '.join(_TESTS)}")
    modules = parser.parse_args().modules
    if unknown := [module for module in modules if module not in _TESTS]:
        parser.error(f"{', '.join(unknown)}: no such module here; there are {', '.join(_TESTS)}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        subprocess.run(["git", "clone", "--quiet", _ROOT, copy], check=True)
        survivors = [_survivors(copy, module) for module in modules]
    print("\n".join(survivors))


def _survivors(copy: Path, module: str) -> str:
    """The report of cosmic-ray on one module of the repository's copy."""
    config, session = copy / "mutation.toml", copy / f"{module.replace('/', '-')}.sqlite"
    tests = " ".join(f"tests/{test}" for test in _TESTS[module])
    config.write_text(_CONFIG.format(module=module, tests=tests, python=sys.executable, left_out=json.dumps(_LEFT_OUT)))
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(tool: str, *arguments: str | Path) -> str:
        command = [Path(sys.executable).with_name(tool), *arguments]
        return subprocess.run(command, cwd=copy, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout

    run("cosmic-ray", "init", config, session)
    run("cr-filter-operators", session, config)
    run("cosmic-ray", "baseline", config)
    run("cosmic-ray", "exec", config, session)
    return f"=== {module}\n" + run("cr-report", "--surviving-only", "--show-diff", session)


if __name__ == "__main__":
    main()
