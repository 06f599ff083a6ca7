"""The table of sources: what params.yaml may name, one's own among them."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest

from flows import demos
from prelar.config import RECORDED, SOURCES, Demos, load_config
from prelar.demos.sources import KINDS, listing, open_source
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from prelar.utils.errors import UserError
from prelar.validation import suites
from tests.conftest import ROOT
from tests.flows.inline import work_inline

PAGE = ROOT / "docs/own-source.md"


def settings(**changes: object) -> Demos:
    """The group demos of params.yaml with other values, checked."""
    return Demos.model_validate(load_config(ROOT / "params.yaml").demos.model_dump() | changes)


@pytest.fixture
def tapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module of the page, and episodes that it reads."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "tapes.py").write_text(code, encoding="utf-8")
    random = np.random.default_rng(0)
    for number in range(3):
        path = tmp_path / f"recorded/stack/{number}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = random.integers(0, 256, (9, 64, 64, 3), np.uint8)
        np.savez(path, rgb=frames, act=random.normal(size=(9, 2)))
    path.write_bytes(b"none")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "recorded"


def test_the_page_s_own_source_becomes_a_valid_store(tapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(settings(source="tapes:Tapes", path=str(tapes)))
    work_inline(monkeypatch)
    with StoreWriter(Path("x.zarr"), arrays=source.arrays) as writer:
        assert demos.fill(writer, source, source.jobs(), 1) == 2
        writer.finish(source.attributes())
    store = Store.open(Path("x.zarr"))
    suites.validate("demos", demos.suites(store, source, 0.5), suites.facts(store))
    with np.load(tapes / "stack/1.npz") as held:
        assert np.array_equal(store.read(9, 9), held["rgb"])
    plan = demos.planned(settings(source="tapes:Tapes", path=str(tapes)))
    Path("tapes.py").write_text(Path("tapes.py").read_text() + "\n")
    assert demos.planned(settings(source="tapes:Tapes", path=str(tapes))).folder != plan.folder


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 40


def test_an_entry_point_is_a_source(tapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("tapes", "tapes:Tapes", "prelar.sources")
    found = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found.select(group=group))
    assert len(open_source(settings(source="tapes", path=str(tapes))).jobs()) == 3
    assert "demos.source: tapes\n  your own: tapes:Tapes" in listing()


def test_a_source_that_cannot_be_imported_is_refused_in_a_line(tapes: Path) -> None:
    for name in ("tapes:Nothing", "nowhere:Tapes"):
        with pytest.raises(UserError, match=rf"demos\.source = {name}: cannot be imported"):
            open_source(settings(source=name))


def test_the_table_and_params_know_the_same_names() -> None:
    assert tuple(KINDS) == SOURCES
    assert all(f"demos.source: {name}\n" in listing() for name in SOURCES)
    assert set(RECORDED) < set(SOURCES)
