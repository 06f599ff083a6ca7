"""Rendering of Meta-World: our frames of 64×64, drawn at 128×128, against gymnasium's `render()` at 128×128,
and of both suites: fast frames against faithful ones, drawn as the suite draws.

Each reading is a process of its own: in software, gymnasium's viewer draws into whichever context is current.
A picture of both, enlarged, side by side, goes to reports/render.png.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from prelar.config import View
from prelar.envs import gl, make_env

TASK, CAMERA = "drawer-open", "corner"
SUITES = {"metaworld": TASK, "dmc": "dmc/walker-walk"}
DRAWN = 128
PAIRS = 5
SECONDS = 3.0
PIXELS = 512
PICTURE = Path("reports/render.png")

Frame = npt.NDArray[np.uint8]


def run() -> dict[str, float]:
    """`render_fps`, and `render_vs_gymnasium`: the median of the paired ratios."""
    gl.ensure()
    readings = [(reading("ours"), reading("gymnasium")) for _ in range(PAIRS)]
    ratios = [ours / theirs for ours, theirs in readings]
    middle = statistics.median(ratios)
    print(
        f"render_vs_gymnasium: {middle:.1f} (from {min(ratios):.1f} to {max(ratios):.1f}, {PAIRS} pairs), "
        f"picture: {PICTURE}"
    )
    shown = [
        Image.open(picture(who)).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
        for who in ("ours", "gymnasium")
    ]
    Image.fromarray(np.concatenate([np.asarray(one) for one in shown], axis=1)).save(PICTURE)
    for who in ("ours", "gymnasium"):
        picture(who).unlink()
    figures = {"render_fps": statistics.median(ours for ours, _ in readings), "render_vs_gymnasium": middle}
    return figures | renderers()


def renderers() -> dict[str, float]:
    """Frames a second of either renderer in each suite, and the median of their paired ratios."""
    figures = {}
    for suite, task in SUITES.items():
        pairs = [(reading(f"fast {task}"), reading(f"faithful {task}")) for _ in range(PAIRS)]
        ratios = [fast / faithful for fast, faithful in pairs]
        for name, column in zip(("fast", "faithful"), zip(*pairs, strict=True), strict=True):
            figures[f"render_{suite}_{name}_fps"] = statistics.median(column)
        figures[f"render_{suite}_fast_vs_faithful"] = statistics.median(ratios)
        print(
            f"render_{suite}_fast_vs_faithful: {statistics.median(ratios):.1f} "
            f"(from {min(ratios):.1f} to {max(ratios):.1f}, {PAIRS} pairs)"
        )
    return figures


def picture(who: str) -> Path:
    """Where the process of `who` leaves its frame."""
    return PICTURE.with_name(f"render-{who}.png")


def reading(who: str) -> float:
    """Frames a second of one process."""
    done = subprocess.run([sys.executable, "-m", __name__, who], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(who: str) -> None:
    """Measure one renderer, leave a frame of it, print its frames a second."""
    words = who.split()
    render = gymnasium() if who == "gymnasium" else ours(*words) if len(words) > 1 else ours()
    frame = render()
    frames, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        frame = render()
        frames += 1
    rate = frames / (time.perf_counter() - begin)
    if len(words) == 1:
        picture(who).parent.mkdir(exist_ok=True)
        Image.fromarray(frame).save(picture(who))
    print(rate)


def ours(renderer: str = "fast", task: str = TASK) -> Callable[[], Frame]:
    """Our simulator's frames."""
    simulator = make_env(task, view=View(renderer=renderer))
    simulator.reset(0, 0)
    return simulator.render


def gymnasium() -> Callable[[], Any]:
    """The peer of record: Meta-World through gymnasium, as it comes."""
    import gymnasium
    import metaworld  # noqa: F401

    env = gymnasium.make(
        "Meta-World/MT1",
        env_name=f"{TASK}-v3",
        render_mode="rgb_array",
        width=DRAWN,
        height=DRAWN,
        camera_name=CAMERA,
    )
    env.reset(seed=0)
    return env.render


if __name__ == "__main__":
    main(sys.argv[1])
