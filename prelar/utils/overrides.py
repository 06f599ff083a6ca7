"""Values of params.yaml on the command line of `dvc exp run`, which reads them by Hydra's grammar."""

from __future__ import annotations

import re
from typing import Any

_PLAIN = re.compile(r"(?!(?i:null|true|false|nan|inf)\Z)[A-Za-z/][A-Za-z0-9_./@:-]*")
"""Texts that Hydra reads as they are."""


def override(value: Any) -> str:
    """A value of params.yaml, none or a list of such, as `-S` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(override, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    if _PLAIN.fullmatch(value):
        return value
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation of OmegaConf's
    quoted = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), literal)
    return f"'{quoted}'"
