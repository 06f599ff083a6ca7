"""What a user brings along: an object named in params.yaml as `module:Class` or by an entry point."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prelar.utils.errors import UserError, one_line


def load_own(key: str, name: str, group: str) -> Callable[..., Any]:
    """What a key of params.yaml names, imported from where the command runs or from what is installed.

    Raises `UserError` where it cannot be imported.
    """
    points = importlib.metadata.entry_points(group=group)
    place = next((point.value for point in points if point.name == name), name)
    module, _, attribute = place.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} = {name}: cannot be imported ({one_line(error)}); mend it") from None
    return found
