"""The stand-ins for RLBench and PyRep have what the real packages have (tests/standins/facts.toml)."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rlbench_standin import STANDINS

FACTS: dict[str, Any] = tomllib.loads((STANDINS / "facts.toml").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-ins can be imported, and are gone afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(STANDINS))
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("rlbench", "pyrep"):
            del sys.modules[name]


def named(path: str) -> Any:
    """What a dotted name stands for: a module's path, then attributes."""
    parts = path.split(".")
    depth = max(n for n in range(1, len(parts)) if (STANDINS / Path(*parts[:n])).with_suffix(".py").exists())
    found: Any = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", FACTS["signatures"])
def test_signatures_are_the_real_ones(path: str) -> None:
    signature = inspect.signature(named(path))
    assert list(signature.parameters) == FACTS["signatures"][path].split()
    for name, value in FACTS["defaults"].get(path, {}).items():
        assert signature.parameters[name].default == value


def test_values_are_the_real_ones() -> None:
    assert {mode.name: mode.value for mode in named("pyrep.const.RenderMode")} == FACTS["render_modes"]
    seen = FACTS["observation"]
    pictures = {f"{camera}_{kind}" for camera in seen["cameras"] for kind in seen["pictures"]}
    assert set(vars(named("rlbench.backend.observation.Observation")(misc={}))) == pictures | {
        *seen["others"]
    }
    task = named("rlbench.tasks.push_button.PushButton")(None, None)
    error = named("rlbench.backend.exceptions.DemoError")("Why.", task)
    assert str(error) == "Error in task push_button. Why."
