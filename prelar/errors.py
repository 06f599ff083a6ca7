"""Failures that a user can mend, told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or surroundings. The message is one line: what, which value, and the remedy."""


def one_line(error: BaseException) -> str:
    """What an error says, its lines joined, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a `UserError` becomes one line and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
