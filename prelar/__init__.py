"""World-model pre-training from action-free video: DreamerV2, APV, ContextWM and PreLAR."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prelar.api import Loaded
    from prelar.dream import DreamEnv, DreamVectorEnv

__all__ = ["DreamEnv", "DreamVectorEnv", "load"]
__version__ = "0.1.0"

if importlib.util.find_spec("pydantic") is None:
    raise ModuleNotFoundError(
        f"the packages are missing in {sys.executable}; run `make setup`, then `. .venv/bin/activate`"
    )


def load(checkpoint: str | Path, device: str = "cpu", revision: str | None = None) -> Loaded:
    """A trained world model that encodes, imagines and decodes, as `prelar.api.load` says."""
    from prelar import api

    return api.load(checkpoint, device, revision)


def __getattr__(name: str) -> Any:
    """The environments of `prelar.dream`, which want gymnasium."""
    if name not in ("DreamEnv", "DreamVectorEnv"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prelar.utils.errors import extras_named

    with extras_named():
        from prelar import dream
    return getattr(dream, name)
