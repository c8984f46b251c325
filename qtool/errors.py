"""The errors that qtool raises and the exit code of each: a message that says what is wrong, a hint that says what to do."""

from __future__ import annotations

import os
import sys
from typing import ClassVar, Final

from qtool.escaping import shown_lines

EXIT_PASS: Final = 0
EXIT_GATE_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_MODEL: Final = 3
EXIT_SETUP: Final = 4
EXIT_NETWORK: Final = 5
EXIT_INCONCLUSIVE: Final = 6  # neither a pass nor a fail: a script that only asks for 0 does not take it for a pass
EXIT_INTERNAL: Final = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 is the exit code of a failed verdict here
EXIT_INTERRUPTED: Final = 130  # Ctrl-C, as typer ends


class QtoolError(Exception):
    """What a user can act on: `message` says what is wrong, `hint` what to do about it.

    Both are safe to show: without secrets and escape sequences, whatever a file or a server put into them.
    """

    exit_code: ClassVar[int] = EXIT_USAGE

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = shown_lines(message)
        self.hint = shown_lines(hint)
        super().__init__(self.message)
        if hint and sys.version_info >= (3, 11):
            self.add_note(self.hint)  # a traceback shows it too


class UsageError(QtoolError):
    """The command line, a recipe or a panel is wrong (exit 2)."""

    exit_code = EXIT_USAGE


class ModelError(QtoolError):
    """The model is unsupported, corrupt or not what was claimed (exit 3)."""

    exit_code = EXIT_MODEL


class SetupError(QtoolError):
    """The machine lacks something: a package, an engine, disk space (exit 4)."""

    exit_code = EXIT_SETUP


class NetworkError(QtoolError):
    """The hub or a server cannot be reached, or refuses the request (exit 5)."""

    exit_code = EXIT_NETWORK


class InternalError(QtoolError):
    """A bug: an exception that qtool did not expect (exit 70). Only the command line raises it."""

    exit_code = EXIT_INTERNAL


def reason(error: BaseException) -> str:
    """Why an operation failed, as the end of a sentence without its full stop: an OSError may lack a text of its own."""
    if isinstance(error, OSError) and error.args[1:]:  # otherwise its text is all that it has
        text = error.strerror or (os.strerror(error.errno) if error.errno else "")
    else:
        text = str(error).strip().rstrip(".")
    return text or type(error).__name__
