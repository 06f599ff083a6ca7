"""What the steps of RLBench's demonstrations become in a store, whether planned live or read from a folder.

Of each step three things are kept: the motion that the action mode names, the gripper's pose and its opening.

    joint_velocity   the arm's joint velocities at step t (rad/s)
    joint_position   the arm's joint positions at step t + 1 (rad), where the motion leads
    gripper_pose     the gripper's position (m) and quaternion x, y, z, w at step t + 1

The gripper's opening (1 open, 0 closed) of the same step ends each action. RLBench's planner makes the same
demonstrations whatever the action mode: it decides what is written down as their actions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

WIDTH = 7
RATE = 20.0
MOTIONS = {
    "joint_velocity": "joint_velocities",
    "joint_position": "joint_positions",
    "gripper_pose": "gripper_pose",
}
AHEAD = ("joint_position", "gripper_pose")


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
    action_mode: str,
    motion: npt.NDArray[np.float64],
    pose: npt.NDArray[np.float64],
    opening: npt.NDArray[np.float64],
) -> dict[str, npt.NDArray[np.float32]]:
    """`actions` and `gripper` of a demonstration, float32 (T, 8) each.

    motion: (T, 7), the field of `MOTIONS`. pose: (T, 7). opening: (T). The last action is zero.
    """
    moved = np.concatenate([motion, opening[:, None]], axis=1)
    actions = np.zeros(moved.shape, dtype=np.float32)
    actions[:-1] = moved[1:] if action_mode in AHEAD else moved[:-1]
    return {
        "actions": actions,
        "gripper": np.concatenate([pose, opening[:, None]], axis=1).astype(np.float32),
    }
