"""World-model pre-training from action-free video: DreamerV2, APV, ContextWM and PreLAR."""

import importlib.util
import sys

if importlib.util.find_spec("pydantic") is None:
    raise ModuleNotFoundError(
        f"the packages are missing in {sys.executable}; run `make setup`, then `. .venv/bin/activate`"
    )
