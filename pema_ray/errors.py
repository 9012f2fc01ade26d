"""The one error a user can cause. Knows nothing of the rest of the package.

A `UserError` says what is wrong, where, and what to do, in one or two lines. The command line
prints it without a traceback and leaves with exit code 2. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake in the input, the configuration or the environment, worded for the one who can mend it."""


class FingerprintMismatch(UserError):
    """Two artefacts that belong to different PLMs were brought together."""

    def __init__(self, what: str, found: str, expected: str) -> None:
        super().__init__(
            f"{what} belongs to PLM '{found}', but this run uses PLM '{expected}'. "
            "Name the PLM that it was made with, or begin a run of its own (another run_dir) with this one."
        )
        self.found, self.expected = found, expected

    def __reduce__(self):  # Ray carries exceptions between processes by pickling them
        return (_rebuild_mismatch, (str(self), self.found, self.expected))


def _rebuild_mismatch(message: str, found: str, expected: str) -> FingerprintMismatch:
    error = FingerprintMismatch.__new__(FingerprintMismatch)
    Exception.__init__(error, message)
    error.found, error.expected = found, expected
    return error


def nearest(name: str, known: Sequence[str]) -> str:
    """A ` Did you mean 'x'?` suffix for an unknown name, or nothing when none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
