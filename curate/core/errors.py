"""Errors a user can act on, with the exit code each one ends in."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """What a command's exit status means; scripts may rely on it."""

    DONE = 0
    BUG = 1
    USAGE = 2
    BAD_DATA = 3
    INTEGRITY = 4
    INCOMPATIBLE = 5
    ENVIRONMENT = 6
    REMOTE = 7
    FAILURE_RATE = 8
    LOCKED = 75
    INTERRUPTED = 130
    TERMINATED = 143


class UserError(Exception):
    """A problem that is not a bug: what was given, what is possible, what to do next.

    ``message`` says what and where, ``hint`` the next step, ``exit_code`` which kind of problem it is.
    """

    def __init__(self, message: str, hint: str = "", exit_code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def unknown(kind: str, given: str, possible: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist, with the nearest one that does."""
    names = sorted(possible)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else "Possible: " + ", ".join(names[:20]) + "."
    return UserError(f"Unknown {kind} '{given}'.", hint)


def require(module: str, extra: str | None = None) -> None:
    """Raise a ``UserError`` with the install command when an optional ``module`` is missing."""
    if importlib.util.find_spec(module) is None:
        what = f"'safeset[{extra}]'" if extra else module
        raise UserError(f"This needs the package '{module}', which is not installed.",
                        f"Install it with: pip install {what}", Exit.ENVIRONMENT)
