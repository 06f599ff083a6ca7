"""A stage in miniature, built on the loop as the real ones are, that can be told where to die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prelar.train import checkpoint
from prelar.train.checkpoint import Snapshots, save_parts
from prelar.train.loop import Hook, Scalars, adam, descend, set_up, train
from prelar.utils.files import remove

STEPS = 24


class Counter:
    """State of its own kind, as an environment has it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_while_saving(number: int) -> None:
    """Make the write of snapshot `number` stop half-way."""
    whole = torch.save
    calls = 0

    def half(state: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        whole(state, path)
        if calls == number:
            os.truncate(path, path.stat().st_size // 2)
            _die()

    checkpoint.torch.save = half  # type: ignore[attr-defined,assignment]


def run(
    folder: Path,
    *,
    kill_at: int | None = None,
    kill_in_save: int | None = None,
    signal_at: tuple[int, int] | None = None,
    kill_at_end: bool = False,
    nan_at: int | None = None,
    lose_log_at: int | None = None,
    pause: float = 0.0,
    steps: int = STEPS,
) -> None:
    """Train, publish `folder`/out, and remove the snapshots in `folder`/resume/toy."""
    fabric = set_up(device="cpu", precision="fp32", threads=1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = adam(model.parameters(), 1e-2)
    module, wrapped = fabric.setup(model, optimizer)
    counter = Counter()
    if kill_in_save is not None:
        _die_while_saving(kill_in_save)

    def step(index: int) -> Scalars:
        time.sleep(pause)
        if index == lose_log_at:
            remove(folder / "log")
        if index == kill_at:
            _die()
        if signal_at is not None and index == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        counter.seen.append(index)
        loss = (module(torch.randn(16, 6)) - 1).square().mean() * (float("nan") if index == nan_at else 1)
        scalars = {"loss/fit": loss.detach(), "gradient_norm": descend(fabric, wrapped, loss)}
        return scalars | ({"episode": float(index)} if index % 7 == 3 else {})

    def look(done: int) -> Scalars:
        (folder / "log").mkdir(exist_ok=True)
        (folder / "log" / "picture").write_text(f"{done} {torch.rand(()).item()}", encoding="utf-8")
        if kill_at_end and done == steps:
            snapshots.wait()
            _die()
        return {"look/noise": torch.rand(())}

    snapshots = Snapshots("toy", root=folder / "resume")
    train(
        step,
        name="toy",
        steps=steps,
        seed=5,
        state={"model": model, "optimizer": optimizer, "counter": counter},
        snapshots=snapshots,
        snapshot_every=4,
        log_folder=folder / "log",
        log_every=3,
        hooks=[Hook(5, look)],
    )
    assert counter.seen == list(range(steps))
    save_parts(folder / "out", {"net": model.state_dict()}, {"step": steps})
    snapshots.remove()
