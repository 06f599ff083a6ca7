"""What of a parameter a page that is passed on may show."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from httpx import InvalidURL

from prelar.data.download import shown


def presentable(value: Any) -> Any:
    """A parameter's value without what is private; lists item by item, other values as they are.

    An address loses user, password, query and fragment. A path from the root or from a home folder keeps its
    last part alone, since the folders above it name the user and the machine.
    """
    if isinstance(value, list):
        return [presentable(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "file:")):
        return f"…/{PurePath(value).name}"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value):
        try:
            return shown(value)
        except InvalidURL:
            return "…"
    return value
