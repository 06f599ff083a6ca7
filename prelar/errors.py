"""Failures that a user can mend, told in one line."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input or surroundings. The message is one line: what, which value, and the remedy."""


def one_line(error: BaseException) -> str:
    """What an error says, its lines joined, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """A text, such as a file's name, with escapes for what a terminal would obey or could not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: what a user can mend becomes one line and exit status 2, Ctrl-C exit status 130.

    Where nobody reads the output any more, as behind `| head`, the work goes on and ends without a word.
    """
    _outlive_readers()
    try:
        main()
    except UserError as error:
        _end(str(error))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or error.filename is None:
            raise
        remedy = "let this user read and write there, or work in a copy of the project"
        _end(f"{error.filename}: {error.strerror}; {remedy}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(told: str) -> None:
    print(f"error: {printable(told)}", file=sys.stderr)
    sys.exit(2)


class _Pipe(io.FileIO):
    """A standard stream; when its reader is gone, what is still written goes nowhere."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(content).nbytes


def _outlive_readers() -> None:
    """Let standard output and error be such streams, and escape what they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            kept = io.TextIOWrapper(
                raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, kept)
