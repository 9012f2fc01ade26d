"""Runs stages from a script or the command line: arguments in, exit code out."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pema_ray.errors import USER_ERROR_EXIT_CODE, UserError
from pema_ray.runtime.environment import quiet_libraries

quiet_libraries()  # before Ray and transformers are imported

from pema_ray.pema.config import ExperimentConfig, load_config  # noqa: E402
from pema_ray.pema.stages.settings import settings_of  # noqa: E402

INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
# What a user's machine can refuse, anywhere: a full disk, rights, a file where a folder should be.
_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
Stage = Callable[[ExperimentConfig], dict[str, Any]]


def stages() -> dict[str, Stage]:
    """Every stage by name, in the order of a run."""
    from pema_ray.pema.stages import build_memory, evaluate, export_head, generate, prepare, report, train

    modules = (prepare, export_head, build_memory, train, generate, evaluate, report)
    return {module.__name__.rsplit(".", 1)[-1]: module.run for module in modules}


def find_stage(name: str) -> Stage:
    """A stage of the chain, or one beside it."""
    if name == "compare":
        from pema_ray.pema.stages import compare

        return compare.run
    return stages()[name]


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; a user's mistake becomes one line on stderr and exit code 2.

    Ctrl-C leaves with 130 and SIGTERM with 143; both end what was begun, Ray included.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("ray", "httpx", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. Finished stages, shards and checkpoints are kept.", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except Terminated:
        print(f"terminated: {_KEPT}", file=sys.stderr)
        return TERMINATED_EXIT_CODE
    except KeyboardInterrupt:
        print(f"interrupted: {_KEPT}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return 0


_KEPT = "finished stages, shards and checkpoints are kept; the same command goes on."


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends what Ctrl-C ends, in the same way."""


def _leave(number: int, frame: object) -> None:
    raise Terminated


def run_stage(name: str, config: Path | None, overrides: Sequence[str]) -> int:
    """One stage of an experiment; returns the exit code."""
    return guarded(lambda: find_stage(name)(load_config(config, overrides)))


def job(name: str) -> None:
    """Entry point of `jobs/<stage>.py`: `--config <file> [section.key=value ...]`."""
    settings = "\n".join(
        f"  {one.key}{'=' + one.default if one.default else ''}\n      {one.meaning}" for one in settings_of(name)
    )
    parser = argparse.ArgumentParser(
        description=find_stage(name).__doc__,
        epilog=f"settings:\n{settings}" if settings else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="an experiment's YAML file, such as configs/quickstart.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single settings")
    arguments = parser.parse_args()
    sys.exit(run_stage(name, arguments.config, arguments.overrides))
