"""What Great Expectations checks on a store of demonstrations, beside the suites of every store."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pandas as pd

from prelar.demos.episodes import ENOUGH, MOTION, STILL, Source, action_range
from prelar.store.store import Store
from prelar.utils.tables import evenly_spaced_indices
from prelar.validation.suites import (
    Check,
    Suite,
    each_between,
    each_given,
    each_in,
    mostly_between,
    store_suites,
)

MIN_FRAMES = 2
MOVING = 0.9
LOOKED_AT = 128


def demonstration_suites(store: Store, source: Source, *, max_bad: float) -> list[Suite]:
    """All suites for demonstrations from `source`.

    At most the share `max_bad` of the clips may be bad, where an expert's failure does not count.
    """
    common = store_suites(store, min_frames=MIN_FRAMES, max_bad=max_bad, width=source.arrays.get("actions"))
    suites = [_without_failures(suite, store) if suite.name == "index" else suite for suite in common]
    suites += [_episodes_suite(store, source), _tasks_suite(store), _motion_suite(store)]
    if store.has("actions"):
        suites.append(_actions_suite(store, source))
    return suites


def _without_failures(suite: Suite, store: Store) -> Suite:
    """The suite of the index, without the episodes that an expert failed."""
    index = store.index.select(["status", "success"]).to_pandas()
    failed = (index["status"] == "bad") & (index["success"].eq(False).fillna(False).astype(bool))
    return dataclasses.replace(suite, table=suite.table[~failed.to_numpy()].reset_index(drop=True))


def _episodes_suite(store: Store, source: Source) -> Suite:
    """A row per stored episode."""
    columns = ["task", "variation", "episode", "camera", "frames", "split", "success"]
    clips = store.clip_index.select(columns).to_pandas()
    episodes = (
        clips.groupby(["task", "variation", "episode"], dropna=False)
        .agg(
            cameras=("camera", lambda names: ", ".join(sorted(names))),
            lengths=("frames", "nunique"),
            splits=("split", "nunique"),
            success=("success", "first"),
        )
        .reset_index()
    )
    episodes["success"] = episodes["success"].astype("object").map(str)
    wanted = ", ".join(sorted(source.cameras))
    checks: list[Check] = [
        each_given("every episode names its task", "task"),
        each_in(f"every episode is shown by the cameras {wanted}", "cameras", (wanted,)),
        each_between("the cameras of an episode show the same number of frames", "lengths", 1, 1),
        each_between("the cameras of an episode are of one split", "splits", 1, 1),
    ]
    if source.solved_only:
        checks.append(each_in("every episode solves its task", "success", ("True",)))
    return Suite("episodes", "The episodes in the store", episodes, tuple(checks))


def _tasks_suite(store: Store) -> Suite:
    """A row per task of the index; what is stored of it."""
    index = store.index.select(["task", "episode", "variation", "status", "split"]).to_pandas()
    rows = []
    for task, clips in index.groupby("task"):
        good = clips[clips["status"] == "ok"]
        stored = len(good[["variation", "episode"]].drop_duplicates())
        held = int("splits" in store.attrs or (good["split"] == "validation").any())
        rows.append({"task": task, "stored": stored, "lacks_validation": int(stored >= ENOUGH and not held)})
    return Suite(
        "tasks",
        "The tasks of the index",
        pd.DataFrame(rows, columns=["task", "stored", "lacks_validation"]),
        (
            each_between(
                f"every task with {ENOUGH} or more episodes has one in validation, unless the source decides",
                "lacks_validation",
                0,
                0,
            ),
        ),
    )


def _motion_suite(store: Store) -> Suite:
    """Clips spread over the store: the share of pixels that change within them."""
    numbers = evenly_spaced_indices(store.num_clips, LOOKED_AT)
    moved = [changed_share(store.read(int(store.clip_start[n]), int(store.clip_length[n]))) for n in numbers]
    return Suite(
        "motion",
        f"{len(numbers)} clips spread over the store",
        pd.DataFrame({"clip": numbers, "changed": np.array(moved, dtype=np.float64)}),
        (mostly_between(f"in at least {MOVING:.0%} of the clips something moves", "changed", 1e-4, MOVING),),
    )


def changed_share(frames: npt.NDArray[np.uint8]) -> float:
    """Share of the pixels of uint8 (T, H, W, 3) that ever depart from the first frame by more than noise."""
    changed = np.zeros(frames.shape[1:3], dtype=bool)
    for frame in frames[1:]:
        changed |= (np.abs(frame.astype(np.int16) - frames[0]) > MOTION).any(axis=-1)
    return float(changed.mean())


def _actions_suite(store: Store, source: Source) -> Suite:
    """A row per clip about its actions."""
    actions = store.array("actions")
    rows = []
    for start, length in zip(store.clip_start.tolist(), store.clip_length.tolist(), strict=True):
        taken, after = actions[start : start + length - 1], actions[start + length - 1]
        rows.append(
            {
                "largest": float(np.abs(taken).max(initial=0)),
                "not_finite": int((~np.isfinite(taken)).sum()),
                "after_last": float(np.abs(after).max()),
                "range": action_range(taken),
            }
        )
    limit = source.action_limit
    return Suite(
        "actions",
        "The actions of each clip",
        pd.DataFrame(rows, columns=["largest", "not_finite", "after_last", "range"]),
        (
            each_between("every action is finite", "not_finite", 0, 0),
            each_between(f"no action is larger than {limit:g}", "largest", 0, limit),
            each_between("there is no action after a clip's last frame", "after_last", 0, 0),
            each_between("the actions of a clip vary", "range", STILL),
        ),
    )
