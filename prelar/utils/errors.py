"""Failures that a user can mend, told in one line."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.metadata
import io
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

LONGEST = 2_000


def printable(text: str, longest: int = LONGEST) -> str:
    """Text from elsewhere as a terminal may have it: what is not printable is escaped, a long one is cut.

    Tabs, ends of lines, control characters, half surrogate pairs and marks that turn the direction of
    writing become `\\t`, `\\x1b`, `\\udcff` and so on; letters of any language stay, and so does what is
    escaped already.
    """
    shown = text[: longest + 1]
    if not shown.isprintable():
        escaped = (sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)
        shown = "".join(escaped)
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


class UserError(Exception):
    """Bad input or surroundings. The message is one line: what, which value, and the remedy.

    Names and values in it may come from elsewhere: it is told as `printable` has it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def one_line(error: BaseException) -> str:
    """What an error says, printable and its lines joined, or its kind where it says nothing."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names, those most like `name` first; none where none is like it."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)


def shown(value: object) -> str:
    """A value as a message shows it: its repr, cut, however large it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 80, 80
    try:
        return printable(short.repr(value), 120)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def remake(place: Path, *, anew: bool = False) -> str:
    """The remedy for a checkpoint or store that is missing or wrong: its stage, where it lies in data/.

    anew: whether DVC has to be made to, since it takes what is there for whole.
    """
    if place.parent.name != "data":
        return "name another"
    return f"run `dvc repro {'-f ' if anew else ''}{place.stem}`"


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: what a user can mend becomes one line and exit status 2, Ctrl-C exit status 130.

    Where nobody reads the output any more, as behind `| head`, the work goes on and ends without a word.
    """
    _outlive_readers()
    try:
        with extras_named():
            main()
    except UserError as error:
        _end(str(error))
    except OSError as error:
        place = error.filename2 or error.filename
        told = error.strerror if place is None else f"{place}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end(f"{told}; make room and run again")
        if place is None:
            raise
        if error.errno in (errno.EROFS, errno.EACCES):
            _end(f"{told}; let this user read and write there, or work in a copy of the project")
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            _end(f"{told}; name another place, or move what is there")
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def extras_named() -> Iterator[None]:
    """Turn the lack of a package that an extra brings into a `UserError` that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (remedy := _installation(error.name or "")) is None:
            raise
        raise UserError(f"{error.name} is not installed; {remedy}") from None


def _installation(module: str) -> str | None:
    """How to install what a module is of: an extra of this package's; None where none has it."""
    from packaging.requirements import Requirement

    name = module.partition(".")[0].replace("_", "-").lower()
    try:
        needed = importlib.metadata.requires("prelar") or []
    except importlib.metadata.PackageNotFoundError:
        return None if name in ("prelar", "flows") else "run `make setup`, then `. .venv/bin/activate`"
    for line in needed:
        found = re.match(r"""([\w.-]+).*extra == ['"]([\w-]+)['"]""", line)
        if found and found[2] != "all" and found[1].replace("_", "-").lower() == name:
            marker = Requirement(line).marker
            if marker is not None and not marker.evaluate({"extra": found[2]}):
                return f"there is none for this Python; the extra {found[2]} needs Python 3.11 to 3.13"
            return f"run: pip install 'prelar[{found[2]}]'"
    return None


def _end(message: str) -> NoReturn:
    print(printable(f"error: {message}"), file=sys.stderr)
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
