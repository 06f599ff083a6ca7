"""What the steps of RLBench's demonstrations become in a store, whether planned live or read from a folder.

Of each step three things are kept: the motion that the action mode names, the gripper's pose and its opening.
The action after step t is what step t + 1 tells, with the motion that led there:

    joint_velocity   the arm's joint velocities at step t + 1 (rad/s)
    joint_position   the arm's joint positions at step t + 1 (rad)
    gripper_pose     the gripper's position (m) and quaternion x, y, z, w at step t + 1

RLBench reads the velocities of a step after the simulator has made it: in recorded episodes the positions
change from step t to step t + 1 by the velocities of step t + 1, times the 0.05 s between them.

The gripper's opening (1 open, 0 closed) of the same step ends each action. RLBench's planner makes the same
demonstrations whatever the action mode: it decides what is written down as their actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 7
RATE = 20.0
MOTIONS = {
    "joint_velocity": "joint_velocities",
    "joint_position": "joint_positions",
    "gripper_pose": "gripper_pose",
}
ALIGNMENT = (
    "actions[t] leads from frame t to frame t + 1, as the source tells with frame t + 1; zero at the last "
    "frame of a clip"
)


class RlbenchDemonstrations:
    """What both sources of RLBench's demonstrations tell of them."""

    @property
    def arrays(self) -> dict[str, int]:
        """Actions: as the action mode says. Gripper: x, y, z, quaternion x, y, z, w, opening."""
        return {"actions": WIDTH + 1, "gripper": WIDTH + 1}

    @property
    def action_limit(self) -> float:
        """Rad/s, rad or m, with room."""
        return 100.0

    @property
    def solved_only(self) -> bool:
        """RLBench keeps successful demonstrations only."""
        return True


def step_arrays(
    motion: npt.NDArray[np.float64], pose: npt.NDArray[np.float64], opening: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.float32]]:
    """`actions` and `gripper` of a demonstration, float32 (T, 8) each.

    motion: (T, 7), the field of `MOTIONS`. pose: (T, 7). opening: (T). The last action is zero.
    """
    return {
        "actions": ahead(np.concatenate([motion, opening[:, None]], axis=1)),
        "gripper": np.concatenate([pose, opening[:, None]], axis=1).astype(np.float32),
    }


def ahead(told: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Actions from what was told with each frame of how it was reached, float32 (T, A); the last one is zero.

    told: (T, A), numbers.
    """
    actions = np.zeros(told.shape, dtype=np.float32)
    actions[:-1] = told[1:]
    return actions
