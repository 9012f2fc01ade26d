"""What a stage's process tells its caller: exit codes, one line for a user's mistake, an end by signals."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
from collections.abc import Callable

from pema_ray.errors import USER_ERROR_EXIT_CODE, UserError
from pema_ray.runtime.environment import quiet_libraries

INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
# What a user's machine can refuse, anywhere: a full disk, rights, a file where a folder should be.
_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


def guarded(work: Callable[[], object]) -> int:
    """Run `work`; a user's mistake becomes one line on stderr and exit code 2.

    Ctrl-C leaves with 130 and SIGTERM with 143; both end what was begun, Ray included.
    """
    quiet_libraries()
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
