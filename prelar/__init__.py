"""World-model pre-training from action-free video: DreamerV2, APV, ContextWM and PreLAR."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prelar.api import Loaded

__all__ = ["load"]
__version__ = "0.1.0"

if importlib.util.find_spec("pydantic") is None:
    raise ModuleNotFoundError(
        f"the packages are missing in {sys.executable}; run `make setup`, then `. .venv/bin/activate`"
    )


def load(checkpoint: str | Path, device: str = "cpu") -> Loaded:
    """A trained world model that encodes, imagines and decodes, as `prelar.api.load` says."""
    from prelar import api

    return api.load(checkpoint, device)
