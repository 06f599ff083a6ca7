"""Stores, checkpoints and params of versions before still read, as docs/compatibility.md says.

`python -m tests.test_compatibility` keeps those of the present version, before its release.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import prelar
from prelar.config import load_config
from prelar.store.schema import index_path
from prelar.store.store import Store
from prelar.store.writer import StoreWriter
from tests.conftest import ROOT
from tests.fake_results import moving
from tests.test_api import save_pretrained

DATA = ROOT / "tests/data"
KEPT = sorted(path.name for path in DATA.iterdir()) if DATA.is_dir() else []
CLIPS = {"a": moving(4), "b": moving(3)[::-1]}
ARRAYS = {"actions": 2}


def keep(folder: Path) -> None:
    """Write a small store, a small checkpoint, the params, and what the model makes of the frames."""
    with StoreWriter(folder / "store.zarr", arrays=ARRAYS) as writer:
        for name, frames in CLIPS.items():
            actions = np.arange(2 * len(frames), dtype=np.float32).reshape(-1, 2)
            row = {"id": name, "split": "train", "label": "move", "fps": 12.0}
            writer.append(frames, row, actions=actions)
        writer.append(None, {"id": "c", "reason": "broken"})
        writer.finish({"source": {"name": "kept"}, "resize": "none", "ffmpeg": "none"})
    save_pretrained(folder / "pretrain", cnn_depth=2, hidden=8, deter=8)
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    model = prelar.load(folder / "pretrain")
    seen = model.encode(CLIPS["a"])
    np.savez(folder / "made.npz", features=seen.features, actions=seen.actions, film=model.decode(seen))


@pytest.mark.parametrize("version", KEPT)
def test_a_store_that_was_kept_opens(version: str) -> None:
    store = Store.open(DATA / version / "store.zarr")
    assert (
        store.clip_index["id"].to_pylist() == list(CLIPS)
        and store.index["reason"].to_pylist()[-1] == "broken"
    )
    assert (store.read(0, store.num_frames) == np.concatenate(list(CLIPS.values()))).all()
    assert store.clips("train", "move", min_length=4).tolist() == [0]
    assert store.pairs.tolist() == [0, 1, 2, 4, 5] and store.array("actions").shape == (7, 2)


@pytest.mark.parametrize("version", KEPT)
def test_a_checkpoint_that_was_kept_says_what_it_said(version: str) -> None:
    model = prelar.load(DATA / version / "pretrain")
    made = np.load(DATA / version / "made.npz")
    seen = model.encode(CLIPS["a"])
    assert np.allclose(seen.features, made["features"], atol=1e-4)
    assert seen.actions is not None and np.allclose(seen.actions, made["actions"], atol=1e-4)
    assert np.abs(model.decode(seen).astype(int) - made["film"]).max() <= 1


@pytest.mark.parametrize("version", KEPT)
def test_params_that_were_kept_are_read(version: str) -> None:
    assert load_config(DATA / version / "params.yaml").loggers == []


def test_something_was_kept() -> None:
    assert KEPT and all(index_path(DATA / version / "store.zarr").is_file() for version in KEPT)


if __name__ == "__main__":
    keep(DATA / prelar.__version__)
