"""`python -m tests.bench.motion`: how much of the hand's motion do raw frames tell, over which time?

Ridge regression from the difference of two frames to the hand's displacement between them, on episodes of
random actions in Meta-World as `prelar.evaluation.probe` plays them: R² on held-out episodes, with frames as
they are learnt from and with frames drawn without antialiasing. It takes some minutes and no training.
"""

from __future__ import annotations

import argparse

import numpy as np

from prelar.envs.metaworld import Image, Simulator
from prelar.evaluation.probe import POSITION, Doubles, Episodes, collect, ridge_r2
from prelar.utils.errors import run_main
from prelar.utils.frames import SIZE

GAPS = (1, 2, 4, 6, 8)
SPLITS = 3
HELD_OUT = 3


class Jagged(Simulator):
    """A simulator that draws without antialiasing."""

    def render(self, camera: str | None = None, width: int | None = None, height: int | None = None) -> Image:
        """The present state as it is drawn: uint8 (height, width, 3)."""
        return self.draw(camera, width or self.width, height or self.height)


def main() -> None:
    """Print a table in Markdown: a row for each way to draw, a column for each gap."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.motion", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="drawer-open")
    parser.add_argument("--camera", default="corner")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    options = parser.parse_args()
    print(f"| frames apart | {' | '.join(map(str, GAPS))} |\n|---|{'---|' * len(GAPS)}", flush=True)
    for name, kind in (("without antialiasing", Jagged), ("antialiased", Simulator)):
        with kind(options.task, camera=options.camera, width=SIZE, height=SIZE) as simulator:
            episodes = collect(simulator, episodes=options.episodes, seed=options.seed)
        cells = []
        for gap in GAPS:
            found = [r2(episodes, gap, split).mean() for split in range(SPLITS)]
            cells.append(f"{np.mean(found):.2f} ({min(found):.2f}-{max(found):.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def r2(episodes: Episodes, gap: int, split: int) -> Doubles:
    """R² of the hand's displacement x, y, z from the differences of frames `gap` steps apart.

    split: number of the draw that holds a third of the episodes out.
    """
    frames = episodes.frames.astype(np.float32)
    path = np.pad(episodes.change[..., POSITION].cumsum(1), ((0, 0), (1, 0), (0, 0)))
    difference, moved = frames[:, gap:] - frames[:, :-gap], path[:, gap:] - path[:, :-gap]
    count, pairs = moved.shape[:2]
    held_out = np.random.default_rng(split).permutation(count) < count // HELD_OUT
    groups, test = np.repeat(np.arange(count), pairs), np.repeat(held_out, pairs)
    return ridge_r2(difference.reshape(len(groups), -1), moved.reshape(len(groups), -1), groups, test)


if __name__ == "__main__":
    run_main(main)
