"""Atomic files, and locks that let one process at a time work in a folder. Knows nothing of the package."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pema_ray.errors import UserError


def temporary_beside(path: Path) -> Path:
    """A unique name beside `path`; not by process id, which containers and machines on a shared disk have in common."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success and is removed on any failure."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}. Start again when it can; what is finished is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a folder, which need not exist yet; the lock file lies beside it.

    The lock is reentrant, and ends with its process, whatever that dies of. On a disk without locks there is none.

    Raises:
        UserError: another process works there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    owner = threading.get_ident(), path.absolute()
    if owner in _lock_owners:
        yield
        return
    file = _locked(path, folder)
    _lock_owners.add(owner)
    try:
        yield
    finally:
        _lock_owners.discard(owner)
        path.unlink(missing_ok=True)
        file.close()


_lock_owners: set[tuple[int, Path]] = set()  # threads of this process, and the locks that they hold


def _locked(path: Path, folder: Path) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            file.close()
            raise UserError(
                f"{folder}: {who or 'another process'} is working there. Wait until it has ended, or end it."
            ) from None
        except OSError:
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner has ended and removed it since it was opened
    with suppress(OSError):  # of a full disk: the lock then names no owner
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file
