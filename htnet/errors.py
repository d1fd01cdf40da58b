"""Exceptions that reach a user, and the exit codes of the command line.

A user's mistake raises :class:`InputError`: one sentence that names the file, row or key, the value found and the rule
it breaks. The command line prints it and exits with 2. Any other exception is a defect of htnet and keeps its
traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_PARTIAL = 1
EXIT_BAD_INPUT = 2


class HTNetError(Exception):
    """Base of the errors that htnet raises on purpose; one message, so that it can be pickled between processes."""


class InputError(HTNetError):
    """Input that cannot be used: the message names the place, the value and the rule."""


class StartError(HTNetError):
    """Part of the system that did not start or answer. The input is not at fault; trying again may help."""


class DiskFullError(HTNetError, OSError):
    """File for which no space is left, made as ``OSError(errno, reason, path)``; its text is ``<path>: <reason>``."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class NonFiniteLossError(HTNetError):
    """Training loss or output that became NaN or infinite; the message names fold, epoch and step or sample."""
